"""Plan the memory and the arithmetic of a training step."""
