"""Everything that knows DeepSpeed or the launcher: ranks, settings, optimizer, sharding, state and
devices; never what is trained.
"""
