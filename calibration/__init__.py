"""Measures a bundle on samples: synthetic pictures, evaluation of accuracy."""
