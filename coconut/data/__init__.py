"""From a data file to batches: examples, tokens, training sequences, batches."""
