"""A run's folder: its configuration, checkpoints and metrics, trackers, and loading its model."""
