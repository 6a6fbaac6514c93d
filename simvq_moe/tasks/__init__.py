"""What is trained: source, data, model, measures and samples of each task, a class each; never the
loop, and never a command.
"""
