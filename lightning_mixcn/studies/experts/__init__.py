"""Measure what each expert is worth by disabling it: ``mixcn experts``."""
