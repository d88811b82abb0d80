"""Evaluate the model while it trains: its text, benchmarks, long documents, and learning from a prompt."""
