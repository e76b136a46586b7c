"""Honest evaluation: ask every question once, judge, count."""
