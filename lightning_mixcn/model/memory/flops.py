"""Count the floating point operations of a training step from the model's modules.

A product of ``[n, i]`` and ``[i, o]`` counts 2·n·i·o; norms, activations, softmax and the decoding of weights count
nothing. Frozen weights have a gradient of their input only; LoRA has those of both factors and of its input. Experts
that have LoRA, where some have none, are taken to have an equal share of the rows. A layer whose input needs no
gradient (the first one, under a frozen embedding) has none. Attention is causal inside documents and counts the pairs
of a token and one that it attends to; its backward counts 2.5 times its forward, since fused kernels compute the scores
again (FlashAttention, https://arxiv.org/abs/2205.14135).

Legend: B rows, S positions of a row, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.lora.attach import adapter_rank

from .checkpointing import layer_modes


@dataclass(frozen=True)
class Flops:
    """Floating point operations, in all or for each unit of something.

    Args:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass, without what it computes again.
        recompute: Operations that backward computes again: activation checkpointing, the product of the down projection
            with LoRA's A, and the logits of a trained head.
    """

    forward: int = 0
    backward: int = 0
    recompute: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        """Add two counts."""
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    def __mul__(self, count: int) -> "Flops":
        """Multiply a count."""
        return Flops(self.forward * count, self.backward * count, self.recompute * count)

    @property
    def total(self) -> int:
        """All that is executed."""
        return self.forward + self.backward + self.recompute

    @property
    def useful(self) -> int:
        """What the result needs: forward and backward, as in a model FLOPs utilisation."""
        return self.forward + self.backward


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a training step, as a function of its tokens.

    Args:
        per_token: Operations for each token that is not padding.
        per_pair: Operations for each pair of a token and one that it attends to (itself too), see `attended_pairs`.
    """

    per_token: Flops
    per_pair: Flops

    def of(self, tokens: int, pairs: int) -> Flops:
        """Count the operations of ``tokens`` that attend to ``pairs``."""
        return self.per_token * tokens + self.per_pair * pairs


def count_training_flops(model: nn.Module, activation_checkpointing: str | Sequence[str]) -> TrainingFlops:
    """Count a model's training step; on the meta device, too.

    Args:
        model: A `MoeForCausalLM` or the PeftModel around it: its sizes, its adapters and what of it trains count.
        activation_checkpointing: A mode, or one for each layer, see `set_activation_checkpointing`.
    """
    base: Any = base_of(model)
    pair = 4 * base.config.num_attention_heads * base.model.layers[0].self_attn.head_dim
    token, attention = Flops(), Flops()
    needs_gradient = base.model.embed_tokens.weight.requires_grad
    modes = layer_modes(activation_checkpointing, len(base.model.layers))
    for layer, mode in zip(base.model.layers, modes, strict=True):
        chain = _Chain(needs_gradient)
        layer_token, layer_pair = _attention(layer.self_attn, chain, pair)
        # With the output projection, whose product CUDA's `attention.projections` leaves out.
        if mode == "selective" and chain.needs_gradient:
            layer_token, layer_pair = _again(layer_token), _again(layer_pair)
        gate_up, down = _experts(layer.mlp, chain, base.config.num_experts_per_tok)
        layer_token += gate_up
        if mode in ("full", "offload") and chain.needs_gradient:  # but for the down product, see `products.finish`
            layer_token, layer_pair = _again(layer_token), _again(layer_pair)
        token, attention, needs_gradient = token + layer_token + down, attention + layer_pair, chain.needs_gradient
    return TrainingFlops(token + _head(base.lm_head, needs_gradient), attention)


def attended_pairs(position_ids_BS: Tensor, document_ids_BS: Tensor, sliding_window: int | None = None) -> Tensor:
    """Count pairs of a token and one that it attends to: n(n + 1)/2 for n tokens of a document in a row.

    Args:
        position_ids_BS: ``[B, S]`` int64; a document begins wherever they do not go on by one.
        document_ids_BS: ``[B, S]`` integers, −1 in padding, which is not counted.
        sliding_window: Most tokens that one attends to.

    Returns:
        A scalar, int64, on the same device; nothing waits for it.

    >>> positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    >>> int(attended_pairs(positions, torch.tensor([[0, 0, 0, 1, 1, -1]])))  # documents of 3 and 2 tokens, 1 of padding
    9
    """
    place_S = torch.arange(position_ids_BS.shape[1], device=position_ids_BS.device)
    starts_BS = F.pad(position_ids_BS.diff(dim=1) != 1, (1, 0), value=True)
    start_BS = torch.where(starts_BS, place_S, 0).cummax(dim=1).values
    attended_BS = place_S - start_BS + 1
    if sliding_window is not None:
        attended_BS = attended_BS.clamp_max(sliding_window)
    return (attended_BS * (document_ids_BS >= 0)).sum()


@dataclass
class _Chain:
    """State of the pass from module to module: a gradient that is needed decides what backward has to do."""

    needs_gradient: bool

    def run(self, module: nn.Module) -> tuple[Flops, bool]:
        """Return the cost of one projection a row, and whether it has an adapter."""
        linear: Any = module
        inputs, outputs, rank = linear.in_features, linear.out_features, adapter_rank(module)
        product = 2 * inputs * outputs
        a, b = (2 * rank * width * len(linear.slots) // linear.groups for width in (inputs, outputs))
        # LoRA: dB (b), the gradient through B (b), dA (a), and the gradient through A (a) where the input needs it.
        backward = (a + 2 * b) + (product + a if self.needs_gradient else 0)
        return Flops(product + a + b, backward), rank > 0


def _attention(attention: Any, chain: _Chain, pair: int) -> tuple[Flops, Flops]:
    """Count attention's cost a token and a pair; the chain continues after the residual connection."""
    inputs = [chain.run(projection) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    inner = _Chain(chain.needs_gradient or any(adapted for _, adapted in inputs))
    output, adapted = inner.run(attention.o_proj)
    chain.needs_gradient = inner.needs_gradient or adapted
    return sum((flops for flops, _ in inputs), output), Flops(pair, 5 * pair // 2 if inner.needs_gradient else 0)


def _experts(mlp: Any, chain: _Chain, top_k: int) -> tuple[Flops, Flops]:
    """Count the cost a token of the router with gate and up of the ``top_k`` experts that it chooses, and of down."""
    router, router_adapted = chain.run(mlp.gate.linear)
    inputs = [chain.run(projection) for projection in (mlp.experts.gate_proj, mlp.experts.up_proj)]
    adapted = router_adapted or any(adapted for _, adapted in inputs) or adapter_rank(mlp.experts.down_proj) > 0
    # Routing weights, and the adapters of gate and up, need the gradient of the hidden rows.
    output, _ = _Chain(chain.needs_gradient or adapted).run(mlp.experts.down_proj)
    chain.needs_gradient = chain.needs_gradient or adapted
    down: Any = mlp.experts.down_proj
    output += Flops(recompute=2 * adapter_rank(down) * down.in_features * len(down.slots) // down.groups)
    return router + sum((flops for flops, _ in inputs), Flops()) * top_k, output * top_k


def _head(head: Any, needs_gradient: bool) -> Flops:
    """Count the head's cost a token; a frozen head's dX is computed with the loss, but counts as backward."""
    product = 2 * head.in_features * head.out_features
    trained = head.weight.requires_grad
    return Flops(product, product * (needs_gradient + trained), product if trained else 0)


def _again(flops: Flops) -> Flops:
    """Add the forward pass once more, as recomputation."""
    return Flops(flops.forward, flops.backward, flops.recompute + flops.forward)
