"""Measurements against a named baseline; none of them is a test."""
