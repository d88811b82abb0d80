"""Clean text before training: duplicates, scripts, noise and benchmark questions in it: ``mixcn data``."""
