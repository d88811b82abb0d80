"""Generate tokens, and evaluate long rows chunk by chunk."""
