"""Random values for what trains, as a run of many steps would leave them; a fresh adapter adds nothing."""

import torch
from torch import nn


def draw_trained(model: nn.Module, scale: float, *, seed: int = 1, around_start: bool = True) -> None:
    """Move every trained parameter.

    Args:
        model: Model with adapters, embeddings or both that train.
        scale: Standard deviation of the moves.
        seed: Seed of the moves.
        around_start: Add them to the present values, instead of replacing these.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                move = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(parameter + move if around_start else move)
