"""Malformed inputs of every kind, from seeds: each must give an answer, or one clear line. ``make fuzz`` runs many."""
