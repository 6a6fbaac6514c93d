"""The schema of a config, how it is read from YAML and flags, and what can't run; no data, no
models.
"""
