"""A profile as one HTML page with plots."""
