"""Measures a bundle on samples: synthetic images, evaluation of accuracy."""
