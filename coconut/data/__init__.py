"""From a data file to batches: examples, their tokens, training sequences, batches."""
