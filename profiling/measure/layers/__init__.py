"""Time of each layer, from the backend's own profiler."""
