"""Measurements of a trained model, and statistics of comparisons between runs."""
