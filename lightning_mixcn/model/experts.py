"""Mixtral's router and experts with frozen, possibly 4-bit weights; drop-in for transformers' modules.

Children are named as PEFT sees them: ``gate_proj``, ``up_proj``, ``down_proj`` are the paper's w1, w3, w2.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from .expert_function import ExpertBlock
from .expert_operands import Dropout, ExpertWeights, Projection
from .few_rows import experts_of_few_rows
from .frozen_linear import FrozenLinear


class Router(MixtralTopKRouter):
    """Top-k softmax router whose weight is a `FrozenLinear`, so that LoRA can stand beside it.

    A subclass of transformers' router, because transformers records router logits by that class.
    """

    def __init__(self, config: MixtralConfig, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.linear = FrozenLinear(
            config.hidden_size, config.num_local_experts, quantization="none", dtype=dtype, device=device
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            hidden_states: ``[..., H]``.

        Returns:
            Router logits ``[T, E]`` in the input's dtype, routing weights ``[T, K]`` float32 that sum to 1, and the
            chosen experts ``[T, K]`` int64.
        """
        logits = self.linear(hidden_states.reshape(-1, self.hidden_dim))
        weights, index = torch.topk(logits.float().softmax(dim=-1), self.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), index


class Experts(nn.Module):
    """All experts of a layer.

    Args:
        config: Sizes.
        quantization: ``nf4`` or ``none``.
        dtype: Storage type where not quantised.
        device: Where the (uninitialised) weights are made.
    """

    def __init__(
        self, config: MixtralConfig, quantization: str, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        hidden, intermediate, experts = config.hidden_size, config.intermediate_size, config.num_local_experts

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
        projections = [cast(Projection, child) for child in (self.gate_proj, self.up_proj, self.down_proj)]
        if not self.training:
            few = experts_of_few_rows(hidden_states, top_k_index, top_k_weights, projections)
            if few is not None:
                return few
        gate, up, down = (projection.factors(hidden_states.dtype) for projection in projections)
        a_gate_up = [factors.a for factors in (gate, up) if factors is not None]
        factors = (
            torch.cat(a_gate_up, dim=1) if a_gate_up else None,
            gate and gate.b,
            up and up.b,
            down and down.a,
            down and down.b,
        )
        weights = ExpertWeights(*(projection.storage for projection in projections))
        probability = max((factor.dropout for factor in (gate, up, down) if factor is not None), default=0.0)
        # Drawn from torch's CPU generator, which activation checkpointing restores: recomputation sees the same masks.
        dropout = Dropout(probability, int(torch.randint(2**31, (), device="cpu"))) if probability > 0.0 else Dropout()
        y: Tensor = ExpertBlock.apply(hidden_states, top_k_index, top_k_weights, weights, dropout, *factors)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return y
