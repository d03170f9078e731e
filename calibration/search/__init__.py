"""``trio-calibrate``: schedules found from samples, with their cost and error."""
