"""The expert block as one autograd function: routed SwiGLU experts over frozen weights with split LoRA.

Saved for backward: the block's input, the gate and up projections' results (``2·S·I``), the products with LoRA's A
(``3·S·R``), the routing and the LoRA factors. Decoded again in backward: the frozen weights. Recomputed: SwiGLU, the
gathered rows, and the dropout masks (from a seed). Never computed: a frozen weight's gradient, and the down
projection's result in backward: the gradient of a routing weight is ⟨dh, h⟩, since the down projection is linear
(SonicMoE, https://arxiv.org/abs/2512.14080).

How the rows meet their experts is the path's affair: `expert_path` says which there are and chooses.

Legend: T tokens, H hidden, I intermediate, K experts a token, R LoRA rank, S = T·K routed rows.
"""

from typing import Any

import torch
from torch import Tensor

from .expert_operands import BlockInputs, Dropout, ExpertFactors, ExpertWeights
from .expert_path import PATHS, choose_expert_path


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
