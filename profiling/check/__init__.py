"""``trio-check``: does every installed backend answer here as it should?"""
