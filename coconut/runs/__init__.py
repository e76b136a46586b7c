"""A run's folder: what it holds, its checkpoints, its metrics, and loading what it made."""
