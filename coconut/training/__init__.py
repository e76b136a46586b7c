"""Training: the loop, its schedule, and its start on one process or several."""
