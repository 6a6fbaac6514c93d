"""Files of anybody, read within bounds, and files of ours, written whole; what those of a run
are called, and nothing about what they mean.
"""
