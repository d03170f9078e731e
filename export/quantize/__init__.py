"""Weights in four or eight bits: which parts, which numbers, where they lie, and how the graphs read them."""
