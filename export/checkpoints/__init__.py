"""Checkpoints: where they come from, their tensors and their text files."""
