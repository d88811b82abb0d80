"""Bytes of activations of a whole model: its layers', and those of what lies around them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters import base_of
from .frozen_linear import FrozenLinear
from .layer_memory import LayerActivations, LayerCounter, MicroBatch


@dataclass(frozen=True)
class ModelActivations:
    """Bytes of a model's training pass on a micro-batch.

    Args:
        layers: Of each decoder layer.
        shared: Of the tables of rotary positions.
        tail: What the last norm and the head keep.
        head: What the head needs beside that: a chunk of logits, and its weight in the compute dtype where it trains.
        head_backward: The same while it runs backward.
        logits_chunk: Of that the logits.
        decoded: The largest weight that is decoded at a time.
    """

    layers: list[LayerActivations]
    shared: int
    tail: int
    head: int
    head_backward: int
    logits_chunk: int
    decoded: int


def model_activations(model: nn.Module, batch: MicroBatch, device_type: str) -> ModelActivations:
    """Count a model's activations; on the meta device, too.

    Args:
        model: A `MixtralForCausalLM` or the PeftModel around it.
        batch: The shape of a micro-batch.
        device_type: ``cpu`` or ``cuda``, which differ in padding and in what dropout and attention keep.
    """
    base: Any = base_of(model)
    count = LayerCounter(batch, base.model.embed_tokens.output_dtype, device_type, base.config.num_experts_per_tok)
    needs_gradient, layers = base.model.embed_tokens.weight.requires_grad, []
    for layer in base.model.layers:
        activations, needs_gradient = count.layer(layer, needs_gradient)
        layers.append(activations)
    hidden, head = count.tokens * base.config.hidden_size, base.lm_head
    bytes_of_chunk, trained = count.logits_chunk(base.lm_head), head.weight.requires_grad
    weight = head.weight.numel() * count.size if trained and count.size < 4 else 0
    last = base.model.layers[-1]
    return ModelActivations(
        layers,
        shared=2 * count.tokens * last.self_attn.head_dim * count.size,
        tail=hidden * (4 + count.size) * needs_gradient,
        head=bytes_of_chunk + weight + hidden * count.size,
        head_backward=(bytes_of_chunk + weight * 2 + head.weight.numel() * 4 if trained else 0) + hidden * count.size,
        logits_chunk=bytes_of_chunk,
        decoded=max(count.decoded(module) for module in base.modules() if isinstance(module, FrozenLinear)),
    )
