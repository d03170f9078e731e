"""Selectors of a stage inside the decoder (``--method``), one file each."""
