"""Measurements of one schedule on samples."""
