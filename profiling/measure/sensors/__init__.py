"""Sensors: memory, power, clocks and temperature while a bundle runs."""
