"""Cost of a bundle, measured on this machine or predicted for another one: ``trio-profile``."""
