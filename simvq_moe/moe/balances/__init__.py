"""How the use of experts is evened out, one method a file: a loss, or biases of the choice."""
