"""Measures the milliseconds, the bytes and the watts of a bundle on this machine."""
