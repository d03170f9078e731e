"""Calibration and evaluation on samples."""
