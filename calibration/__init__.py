"""Chooses schedules and scales on samples, and compares bundles."""
