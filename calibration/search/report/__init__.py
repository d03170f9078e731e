"""Results of a search: ``calibration.json``, a page and its plots."""
