"""Candidate schedules: the space they come from, what each costs, and the search for those worth having."""
