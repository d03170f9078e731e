"""Weights in four or eight bits: their parts, formats and storage, and the graphs that read them."""
