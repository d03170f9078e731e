"""``trio-check``: checks every installed backend's answers on this machine."""
