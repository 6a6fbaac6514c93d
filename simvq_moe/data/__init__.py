"""What the models are trained on: image crops, token windows, and the order they are seen in."""
