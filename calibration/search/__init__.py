"""Schedules found from samples: which layers drop which visual tokens, and what that costs."""
