"""Handing models on: the card, the Hugging Face hub, checkpoints of other code."""
