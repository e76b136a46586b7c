"""Make passes faster or smaller without changing what they compute. `facade.Acceleration` is the one entry point."""
