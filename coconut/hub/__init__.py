"""Exchange with others: model card, upload to the Hugging Face hub, the paper's checkpoints, lm-evaluation-harness."""
