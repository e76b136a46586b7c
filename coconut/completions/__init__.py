"""Sampled completions: groups of them, their batches and log-probabilities."""
