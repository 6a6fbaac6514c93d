"""The kinds of quantizers, one a file: its class, its options and what it refuses."""
