"""Compare models by blind judgements of their answers: ``mixcn preference``."""
