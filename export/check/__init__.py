"""Checks of an export: what TensorRT reads, and whether the bundle fits a device."""
