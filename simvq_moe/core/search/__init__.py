"""The search for the nearest code, exact, in tiles and on any device; no quantizer."""
