"""What a model costs before it is run: memory of a training step on a GPU, and floating-point operations."""
