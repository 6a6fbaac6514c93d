"""Files of anybody, read within bounds, and files of ours, written whole; nothing about what they
mean.
"""
