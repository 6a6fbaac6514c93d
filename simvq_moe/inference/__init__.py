"""What finished runs are good for: evaluate, fold, encode, decode and generate; no training."""
