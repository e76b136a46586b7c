"""Exporting models: model card, upload to the Hugging Face hub, import of the paper's released checkpoints."""
