"""Banks of rows under a map, the nearest code, gradients, usage counts, moments and collectives; no
config, no DeepSpeed, no file.
"""
