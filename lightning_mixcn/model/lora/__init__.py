"""Attach LoRA to attention, router and every expert, and store it in PEFT's format."""
