"""Models around the core: tokenizers of images and audio, and a language model with mixtures."""
