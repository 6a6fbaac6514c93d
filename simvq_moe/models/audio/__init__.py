"""The audio tokenizer, what it is trained against, and what measures its recordings."""
