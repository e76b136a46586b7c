"""Answering questions: thoughts first, then words."""
