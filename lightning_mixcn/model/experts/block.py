"""Router and experts with frozen, possibly 4-bit weights; drop-in for transformers' modules.

Children are named as PEFT sees them: ``gate_proj``, ``up_proj``, ``down_proj`` are the paper's w1, w3, w2.

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, S = T·K routed rows, n rows of one expert.
"""

from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lightning_mixcn.model.architectures import Architecture, architecture_of
from lightning_mixcn.model.nf4.linear import FrozenLinear

from .fused import fused_loop
from .loop import Dropout, ExpertFactors
from .path import PATHS, choose_expert_path
from .routing import choose_experts, route_rows, sum_choices


class Router(nn.Module):
    """Top-k softmax router whose weight is a `FrozenLinear`, so that PEFT can adapt it; see `router_class`.

    Attributes:
        normalises: Whether the weights of a token's experts sum to 1.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)  # not that of transformers' router, which may come next
        self.top_k: int = config.num_experts_per_tok
        self.num_experts: int = config.num_local_experts
        self.hidden_dim: int = config.hidden_size
        self.normalises = architecture_of(config).normalises(config)
        self.linear = FrozenLinear(self.hidden_dim, self.num_experts, quantization="none", dtype=dtype, device=device)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            hidden_states: ``[..., H]``.

        Returns:
            Router logits ``[T, E]`` in the input's dtype, routing weights ``[T, K]`` float32, which sum to 1
            where the family normalises them, and the chosen experts ``[T, K]`` int64.
        """
        logits = self.linear(hidden_states.reshape(-1, self.hidden_dim))
        return logits, *choose_experts(logits, self.top_k, normalises=self.normalises)


@cache
def router_class(architecture: Architecture) -> type[Router]:
    """Return the class of a family's router: transformers records router logits by its own, so it is one of that."""
    stock = architecture.router
    return type(f"Frozen{stock.__name__}", (Router, stock), {"__module__": __name__})


class Experts(nn.Module):
    """All experts of a layer.

    Args:
        config: Sizes.
        quantization: ``nf4`` or ``none``.
        dtype: Storage type where not quantised.
        device: Device of the (uninitialised) weights.
    """

    def __init__(
        self, config: PreTrainedConfig, quantization: str, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_local_experts
        intermediate = getattr(config, architecture_of(config).expert_width)

        def projection(in_features: int, out_features: int) -> FrozenLinear:
            return FrozenLinear(
                in_features, out_features, experts, quantization=quantization, dtype=dtype, device=device
            )

        self.gate_proj = projection(hidden, intermediate)
        self.up_proj = projection(hidden, intermediate)
        self.down_proj = projection(intermediate, hidden)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the chosen experts and sum their weighted results.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, K]`` int64.
            top_k_weights: ``[T, K]``.

        Returns:
            ``[T, H]`` in the dtype of ``hidden_states``.
        """
        projections = self.gate_proj, self.up_proj, self.down_proj
        weights = self.gate_proj.storage, self.up_proj.storage, self.down_proj.storage
        if not self.training and all(
            weight.gemv is not None and weight.gemv.serves(hidden_states) for weight in weights
        ):
            return self._forward_gemv(hidden_states, top_k_index, top_k_weights)
        masters = [projection.active_masters() for projection in projections]
        gate, up, down = (pair and pair.b for pair in masters)
        factors = ExpertFactors(None, gate, up, None, down, self.gate_proj.slots)
        path = choose_expert_path(hidden_states, top_k_index, weights, factors)
        probability = max((pair.dropout for pair in masters if pair is not None), default=0.0)
        # Drawn from torch's CPU generator, which activation checkpointing restores: recomputation sees the same masks.
        dropout = Dropout(probability, int(torch.randint(2**31, (), device="cpu"))) if probability > 0.0 else Dropout()
        operands = hidden_states, top_k_index, top_k_weights, weights, dropout
        if path == "fused":  # casts the masters itself, where it copies them anyway
            gate_scale, up_scale, down_scale = (1.0 if pair is None else pair.scale for pair in masters)
            pairs = [(None, None) if pair is None else (pair.a, pair.b) for pair in masters]
            return fused_loop(
                *operands, (gate_scale, up_scale, down_scale), *chain.from_iterable(pairs), self.gate_proj.slots
            )
        return PATHS[path](*operands, *self._factors(hidden_states.dtype))

    def _factors(self, dtype: torch.dtype) -> ExpertFactors:
        gate, up, down = (projection.factors(dtype) for projection in (self.gate_proj, self.up_proj, self.down_proj))
        a_gate_up = [pair.a for pair in (gate, up) if pair is not None]
        return ExpertFactors(
            torch.cat(a_gate_up, dim=1) if a_gate_up else None,
            gate and gate.b,
            up and up.b,
            down and down.a,
            down and down.b,
            self.gate_proj.slots,
        )

    def _forward_gemv(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Compute the block for a few tokens without gradients, by the kernel of `GemvStack`."""
        routing = route_rows(index_TK, self.gate_proj.groups, padded=False)
        y_SH = x_TH.new_empty(len(routing.token), x_TH.shape[1])
        for expert, rows in routing.experts():
            x_nH = x_TH[routing.token[rows]]
            h_nI = F.silu(_gemv(self.gate_proj, x_nH, expert)).mul_(_gemv(self.up_proj, x_nH, expert))
            y_SH[rows] = _gemv(self.down_proj, h_nI, expert)
        return sum_choices(y_SH, routing.row, weight_TK, x_TH.dtype)


def _gemv(projection: FrozenLinear, rows: Tensor, expert: int) -> Tensor:
    assert projection.storage.gemv is not None
    y = projection.storage.gemv.product(rows, expert)
    if (slot := projection.slots.get(expert)) is None:
        return y
    factors = projection.factors(rows.dtype, slice(slot, slot + 1))
    return y if factors is None else y.addmm_(rows @ factors.a[0].t(), factors.b[0].t())
