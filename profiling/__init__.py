"""``trio-profile`` and ``trio-check``: the cost of a bundle, measured here or predicted for another device."""
