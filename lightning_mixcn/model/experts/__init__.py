"""Compute the experts of a layer: routing, 4-bit products, LoRA."""
