"""Measure likelihood and retrieval against the length of the context."""
