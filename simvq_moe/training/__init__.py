"""Training: one loop over a DeepSpeed engine, for any number of ranks."""
