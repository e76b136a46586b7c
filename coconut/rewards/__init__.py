"""Process rewards without labels of steps: a reward model trained on whole answers, read token by token."""
