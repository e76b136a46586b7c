"""LatentLM, the causal language model that thinks, and what it is made of."""
