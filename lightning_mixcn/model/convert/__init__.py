"""Make other models: dense to mixture of experts, 16 bits to 4."""
