"""Multiply with frozen weights and LoRA in one product, and leave out of recomputation what backward does not need."""
