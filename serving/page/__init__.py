"""The page at ``/``: one file without a build step, and the headers it is served with."""
