"""What kinds of quantizers are made of: grids, and where codes start and start again."""
