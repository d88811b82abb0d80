"""What a model consists of: parameters and bytes by purpose, the plan, and the check that the plan was met."""

from math import prod

from torch import Tensor, nn
from transformers import MixtralConfig

from .frozen_linear import FrozenLinear
from .mixtral import ATTENTION_PROJECTIONS
from .nf4 import superblocks
from .weights import NF4Weight

_SUPERBLOCK_BYTES = 8192 + 256 + 4 + 4


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Weights by kind: ``total`` (base and adapters, 4-bit ones by their elements), ``trainable``, ``quantised``."""
    quantised = sum(prod(module.shape) for module in model.modules() if isinstance(module, NF4Weight))
    packed = {id(parameter) for parameter in _packed(model)}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in packed]
    return {
        "total": quantised + sum(parameter.numel() for parameter in dense),
        "trainable": sum(parameter.numel() for parameter in dense if parameter.requires_grad),
        "quantised": quantised,
    }


def bytes_in_memory(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters: ``quantised`` (codes and scales), ``trainable`` and ``dense`` (the frozen rest)."""
    packed = {id(parameter) for parameter in _packed(model)}
    sizes = {"quantised": 0, "trainable": 0, "dense": 0}
    for parameter in model.parameters():
        kind = "quantised" if id(parameter) in packed else "trainable" if parameter.requires_grad else "dense"
        sizes[kind] += parameter.nbytes
    return sizes


def planned_quantised_bytes(config: MixtralConfig) -> int:
    """Bytes of codes and scales when attention projections and experts are in NF4, from the sizes alone."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = [config.hidden_size * width for width in (query, key_value, key_value, query)]
    experts = [config.num_local_experts * config.intermediate_size * config.hidden_size] * 3
    assert len(attention) == len(ATTENTION_PROJECTIONS)
    return config.num_hidden_layers * _SUPERBLOCK_BYTES * sum(superblocks(numel) for numel in attention + experts)


def verify_quantised(model: nn.Module, config: MixtralConfig) -> None:
    """Check that every expert and attention projection is in 4 bits and that bytes are within 2 % of the plan.

    Raises:
        RuntimeError: names what is not in 4 bits, or states both byte counts.
    """
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear) and "gate.linear" not in name and not isinstance(module.storage, NF4Weight)
    ]
    if dense:
        raise RuntimeError(f"{len(dense)} projections are not in 4 bits, the first is {dense[0]}")
    held, planned = bytes_in_memory(model)["quantised"], planned_quantised_bytes(config)
    if abs(held - planned) > 0.02 * planned:
        raise RuntimeError(f"the 4-bit weights take {held:,} bytes, more than 2 % off the planned {planned:,}")


def _packed(model: nn.Module) -> list[Tensor]:
    return [p for module in model.modules() if isinstance(module, NF4Weight) for p in module.parameters()]
