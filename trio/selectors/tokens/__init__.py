"""Selectors before the decoder (``--token-method``), one file each."""
