"""Measures time, memory and power of a bundle on this machine."""
