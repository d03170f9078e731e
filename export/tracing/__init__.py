"""The graphs of an export, their shapes, and the order in which they run."""
