"""What is trained: source, data, model, measures and samples of each task; never the loop."""
