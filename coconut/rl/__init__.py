"""Reinforcement learning: answers are sampled in groups, judged, and the model is pulled towards the better ones."""
