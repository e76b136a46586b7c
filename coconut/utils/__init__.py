"""What every part of the project uses: files, the screen, Hydra, opening models, torch."""
