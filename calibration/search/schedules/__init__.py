"""Candidate schedules: their space, their cost, and the search for the best ones."""
