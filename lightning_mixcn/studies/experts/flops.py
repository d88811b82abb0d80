"""Floating point operations of the study of experts, beside those of evaluating the model once for each expert.

Counted as in `lightning_mixcn.model.memory.flops`: a product of ``[n, i]`` and ``[i, o]`` is 2·n·i·o; norms, softmax
and the decoding of weights are nothing. Padding is computed like text and counts, in both.

Legend: L layers, E experts, K experts a token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixcn.model.causal_lm import ATTENTION_PROJECTIONS, base_of
from lightning_mixcn.model.lora.attach import LoraFrozenLinear
from lightning_mixcn.model.memory.flops import attended_pairs


@dataclass(frozen=True)
class ForwardFlops:
    """What parts of a forward pass cost.

    Args:
        token: FLOP of each layer's attention projections and router, for each token.
        expert: FLOP of one expert of each layer, for each row that it computes.
        pair: Attention, for each pair of a token and one that it attends to; the same in all layers.
        head: For each token.
        top_k: Experts that compute each token.
    """

    token: tuple[int, ...]
    expert: tuple[int, ...]
    pair: int
    head: int
    top_k: int

    @classmethod
    def of(cls, model: nn.Module) -> "ForwardFlops":
        """Count a model, on the meta device too, with its adapters."""
        base: Any = base_of(model)
        config, layers = base.config, base.model.layers
        token = tuple(
            sum(_product(getattr(layer.self_attn, name)) for name in ATTENTION_PROJECTIONS)
            + _product(layer.mlp.gate.linear)
            for layer in layers
        )
        expert = tuple(
            sum(_product(getattr(layer.mlp.experts, name)) for name in ("gate_proj", "up_proj", "down_proj"))
            for layer in layers
        )
        pair = 4 * config.num_attention_heads * layers[0].self_attn.head_dim
        return cls(token, expert, pair, 2 * config.hidden_size * config.vocab_size, config.num_experts_per_tok)

    def above(self, layer: int, tokens: int, pairs: int) -> int:
        """Count all layers above one (−1 for all there are), and the head."""
        left = range(layer + 1, len(self.token))
        per_token = self.head + sum(self.token[index] + self.top_k * self.expert[index] for index in left)
        return per_token * tokens + self.pair * len(left) * pairs

    def layer(self, layer: int, tokens: int, pairs: int, rows: int) -> int:
        """Count one layer, whose experts compute ``rows`` rows together."""
        return self.token[layer] * tokens + self.pair * pairs + self.expert[layer] * rows


@dataclass(frozen=True)
class StudyFlops:
    """What a batch of the study costs if every expert changes every row, and at most one expert a token is new.

    Args:
        forward: The model's costs.
        num_experts: E.
        num_modes: Number of modes of disabling that are studied.
        has_mask: True if one of them is ``mask``, which computes one more expert a token.
        sample_tokens: Tokens of a batch that all experts of a layer compute, to compare their outputs.
    """

    forward: ForwardFlops
    num_experts: int
    num_modes: int
    has_mask: bool
    sample_tokens: int

    def base(self, tokens: int, pairs: int) -> int:
        """Count the evaluation of the model as it is."""
        return self.forward.above(-1, tokens, pairs)

    def layer(self, layer: int, tokens: int, pairs: int) -> int:
        """Count disabling each expert of one layer."""
        rows = tokens * (self.forward.top_k + self.has_mask) + self.sample_tokens * self.num_experts
        copies = self.num_experts * self.num_modes
        return self.forward.layer(layer, tokens, pairs, rows) + copies * self.forward.above(layer, tokens, pairs)

    def planned(self, tokens: int, pairs: int) -> int:
        """Count the whole batch; without modes nothing but the model as it is."""
        layers = range(len(self.forward.token) if self.num_modes else 0)
        return self.base(tokens, pairs) + sum(self.layer(layer, tokens, pairs) for layer in layers)

    def plain(self, tokens: int, pairs: int) -> int:
        """Count one evaluation for each layer, expert and mode, without that of the unchanged model."""
        return len(self.forward.token) * self.num_experts * self.num_modes * self.base(tokens, pairs)


def pairs_of_rows(position_ids_BS: Tensor) -> list[int]:
    """Count pairs of a token and one that it attends to, of each row; padding attends to padding.

    >>> pairs_of_rows(torch.tensor([[0, 1, 2], [0, 1, 0]]))
    [6, 4]
    """
    rows_BS = position_ids_BS.cpu()
    return [int(attended_pairs(row_S[None], torch.zeros_like(row_S[None]))) for row_S in rows_BS]


def _product(module: nn.Module) -> int:
    """Count one row through a projection and its active adapters."""
    linear: Any = module
    rank = 0
    if isinstance(module, LoraFrozenLinear) and not module.disable_adapters:
        rank = sum(module.r[name] for name in module.active_adapters if name in module.lora_A)
    return int(2 * linear.in_features * linear.out_features + 2 * rank * (linear.in_features + linear.out_features))
