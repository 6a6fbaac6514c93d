"""The shared core: banks of rows under one map, nearest-code search, gradients, usage."""
