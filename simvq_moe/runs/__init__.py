"""The folder of a run: who has it, its checkpoints and files, its config and weights; never how it
is trained, and never what its numbers mean.
"""
