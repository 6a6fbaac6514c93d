"""Models around the core: an image tokenizer and a mixture-of-experts language model."""
