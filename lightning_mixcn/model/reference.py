"""Use a model in the middle of its training: in evaluation mode, or as the base that it was before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .experts.observe import unobserved
from .lora.attach import LoraFrozenLinear


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode without gradients; afterwards each submodule's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Compute with the frozen base alone.

    PEFT's own `disable_adapter` also freezes the factors for the time being, and FSDP2 would gather them so from then
    on.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraFrozenLinear)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Evaluate the base: no adapters, no dropout, no gradient, and nothing that observes the routing."""
    with evaluating(model), without_adapters(model), unobserved():
        yield
