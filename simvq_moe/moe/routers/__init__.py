"""How a token's experts are chosen, one router a file; no loss of a model, no file."""
