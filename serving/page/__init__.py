"""The page at ``/``: one file without a build step."""
