"""Counted cost: FLOPs, bytes and memory from shapes alone. Needs no torch."""
