"""Count a model's parameters, and the bytes that decoding its weights moves."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from lightning_mixcn.model.causal_lm import _packed, base_of
from lightning_mixcn.model.nf4.storage import NF4Weight


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count weights: ``total`` (base and adapters, 4-bit ones by their elements), ``trainable``, ``quantised``."""
    quantised = sum(prod(module.shape) for module in model.modules() if isinstance(module, NF4Weight))
    packed = {id(parameter) for parameter in _packed(model)}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in packed]
    return {
        "total": quantised + sum(parameter.numel() for parameter in dense),
        "trainable": sum(parameter.numel() for parameter in dense if parameter.requires_grad),
        "quantised": quantised,
    }


def decoding_bytes(model: nn.Module, modes: Sequence[str]) -> int:
    """Count the bytes read and written to decode the base in one micro-batch: forward, backward, recomputation.

    What the products then read is counted as theirs.

    Args:
        model: A `MoeForCausalLM` or the PeftModel around it; on the meta device, too.
        modes: Activation checkpointing of each layer.
    """
    base: Any = base_of(model)
    size, total = base.model.embed_tokens.output_dtype.itemsize, 0
    for layer, mode in zip(base.model.layers, modes, strict=True):
        whole = _pass(layer, size)
        again = {"none": 0, "selective": _pass(layer.self_attn, size)}.get(mode, whole)
        total += 2 * whole + again
    return total


def _pass(module: nn.Module, size: int) -> int:
    weights = [child for child in module.modules() if isinstance(child, NF4Weight)]
    packed = sum(parameter.nbytes for weight in weights for parameter in weight.parameters())
    return packed + size * sum(prod(weight.shape) for weight in weights)
