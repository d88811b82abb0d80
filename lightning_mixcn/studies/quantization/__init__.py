"""Compare formats of the weights: ``mixcn quantization``."""
