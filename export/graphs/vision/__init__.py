"""Vision graphs, one file for each kind of vision encoder."""
