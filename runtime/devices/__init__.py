"""Devices: memory, streams and events, on the host and through CUDA."""
