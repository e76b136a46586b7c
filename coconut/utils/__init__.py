"""Helpers that every package uses: files, terminal output, Hydra, pretrained loading, torch."""
