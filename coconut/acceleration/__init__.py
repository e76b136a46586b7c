"""What makes passes faster or smaller without changing what they compute."""
