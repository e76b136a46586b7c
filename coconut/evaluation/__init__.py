"""Evaluation: answer every question once, judge the answers, and write them down."""
