"""Evaluate on benchmarks of lm-evaluation-harness: ``mixcn evaluate``."""
