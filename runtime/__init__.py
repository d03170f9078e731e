"""Torch-free runtime of trio-edge."""
