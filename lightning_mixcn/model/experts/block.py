"""Mixtral's router and experts with frozen, possibly 4-bit weights; drop-in for transformers' modules.

Children are named as PEFT sees them: ``gate_proj``, ``up_proj``, ``down_proj`` are the paper's w1, w3, w2.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.nf4.linear import FrozenLinear

from .few_rows import experts_of_few_rows
from .grouped import GroupedExperts, decoding_product, stack_product
from .loop import ExpertLoop
from .operands import (
    BlockGradients,
    BlockInputs,
    Dropout,
    ExpertFactors,
    ExpertWeights,
    Projection,
)


class ExpertPath(Protocol):
    """One way to compute the block and its gradients."""

    def forward(self, inputs: BlockInputs, index: Tensor) -> tuple[Tensor, Sequence[Tensor | None], Any]:
        """Run the block.

        Args:
            inputs: What it is given.
            index: ``[T, K]`` int64, the chosen experts.

        Returns:
            The result ``[T, H]`` in the dtype of ``x``, the tensors that backward needs beside the inputs, and the
            experts' row offsets where the host knows them.
        """

    def backward(
        self, inputs: BlockInputs, kept: Sequence[Any], offsets: Any, grad_TH: Tensor, needs_dx: bool
    ) -> BlockGradients:
        """Gradients of the inputs, from what `forward` gave."""


PATHS: dict[str, ExpertPath] = {
    "loop": ExpertLoop(),
    "grouped": GroupedExperts(stack_product),
    "decode": GroupedExperts(decoding_product),
}

# Device type to (rows per expert below which, path), in ascending order: the winners that benchmarks/expert_block.py
# prints. No GPU has been measured yet, so CUDA has the path that needs no measurement to be right.
FASTEST: dict[str, tuple[tuple[float, str], ...]] = {"cpu": ((math.inf, "loop"),), "cuda": ((math.inf, "loop"),)}


def choose_expert_path(inputs: BlockInputs, index: Tensor) -> str:
    """The path to take: that of the environment variable ``MIXCN_EXPERT_PATH``, else the fastest that was measured.

    Args:
        inputs: What the block is given.
        index: ``[T, K]``, the chosen experts.

    Returns:
        A key of `PATHS`. From the table, ``loop`` stands in for a path that cannot compute these sizes.

    Raises:
        ValueError: ``MIXCN_EXPERT_PATH`` is no path, or one that cannot compute these sizes.
    """
    if wanted := os.environ.get("MIXCN_EXPERT_PATH"):
        if wanted not in PATHS:
            raise UserError(f"`MIXCN_EXPERT_PATH={wanted!r}` is not known. Expected one of {', '.join(PATHS)}")
        if obstacle := _obstacle(wanted, inputs):
            raise UserError(f"`MIXCN_EXPERT_PATH={wanted}` cannot run here: {obstacle}. Unset it, or set it to loop")
        return wanted
    rows_per_expert = index.numel() / inputs.weights.gate.shape[0]
    table = FASTEST.get(inputs.x.device.type, FASTEST["cpu"])
    path = next(path for below, path in table if rows_per_expert < below)
    return "loop" if _obstacle(path, inputs) else path


def _obstacle(path: str, inputs: BlockInputs) -> str | None:
    """Why ``path`` cannot compute the block; ``None`` where it can."""
    x, _, weights, _, lora = inputs
    if path == "loop":
        return None
    if path == "decode" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernel runs on a GPU, not on {x.device.type}"
    if (path == "decode" or x.is_cuda) and not _has_triton():
        return "Triton is not installed (torch's CUDA builds for Linux bring it)"
    if x.is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return f"torch's grouped product needs bfloat16 and an Ampere GPU or a later one, not {x.dtype}"
    ranks = [factor.shape[2] for factor in (lora.b_gate, lora.b_up, lora.b_down) if factor is not None]
    odd = [size for size in (x.shape[1], weights.gate.shape[1], *ranks) if size * x.element_size() % 16]
    if odd:
        return f"rows of {odd[0]} numbers of {x.element_size()} bytes are no multiple of 16 bytes"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class ExpertBlock(torch.autograd.Function):
    """See the module's docstring. Call it as ``ExpertBlock.apply(x, index, weight, weights, dropout, *factors)``.

    Args (of apply):
        x: ``[T, H]`` in the compute dtype.
        index: ``[T, K]`` int64, the chosen experts.
        weight: ``[T, K]``, their routing weights; float32 or the compute dtype.
        weights: the frozen weights.
        dropout: LoRA dropout.
        factors: the five tensors of `ExpertFactors`.

    Returns:
        ``[T, H]`` in the dtype of ``x``: Σₖ weight · down(silu(gate x) ⊙ up x).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights, dropout: Dropout, *factors: Tensor
    ) -> Tensor:
        """Run the block."""
        inputs = BlockInputs(x, weight, weights, dropout, ExpertFactors(*factors))
        ctx.path = choose_expert_path(inputs, index)
        y, kept, ctx.offsets = PATHS[ctx.path].forward(inputs, index)
        ctx.save_for_backward(x, weight, *factors, *kept)
        ctx.weights, ctx.dropout = weights, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the routing weights and the LoRA factors."""
        x, weight, *others = ctx.saved_tensors
        factors, kept = others[: len(ExpertFactors._fields)], others[len(ExpertFactors._fields) :]
        inputs = BlockInputs(x, weight, ctx.weights, ctx.dropout, ExpertFactors(*factors))
        gradients = PATHS[ctx.path].backward(inputs, kept, ctx.offsets, grad_TH, ctx.needs_input_grad[0])
        return gradients.x, None, gradients.weight, None, None, *gradients.lora


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
