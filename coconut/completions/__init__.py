"""Sampled answers: groups of them, their batches and log-probabilities."""
