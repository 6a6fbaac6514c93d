"""The image tokenizer, what it is trained against, and what measures its images."""
