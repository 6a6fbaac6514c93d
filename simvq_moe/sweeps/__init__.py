"""Arms times seeds: the plan, the grid of rates and the execution; no statistics."""
