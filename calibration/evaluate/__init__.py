"""``trio-eval``: accuracy and agreement of bundles on the same questions."""
