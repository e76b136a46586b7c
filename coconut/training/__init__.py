"""Training: the loop, the schedule, and starting it on one process or many."""
