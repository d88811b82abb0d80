"""The expert block with grouped products: all experts in one call, and the host never knows who has how many rows.

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, R LoRA rank, S = T·K routed rows.
"""

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import grouped_mm

from lightning_mixcn.model.nf4.storage import NF4Weight, Weight
from lightning_mixcn.model.products.finish import finish, pending_output

from .loop import Dropout, ExpertFactors, ExpertWeights, masked
from .routing import route_rows_on_device, sum_choices

# (rows [S, in], frozen weights [E, out, in], ends, transposed) → [S, out]: rows Wᵀ where transposed, else, for rows
# [S, out], rows W as [S, in].
FrozenProduct = Callable[[Tensor, Weight, Tensor, bool], Tensor]


def stack_product(rows: Tensor, weight: Weight, ends: Tensor, transposed: bool) -> Tensor:
    """Decode the whole stack, then multiply; the stack lives for this call only.

    Args:
        rows: ``[S, in]`` if ``transposed``, else ``[S, out]``.
        weight: The frozen matrices ``[E, out, in]``.
        ends: ``[E]`` int32, the row after each expert's last.
        transposed: ``rows Wᵀ`` (forward), else ``rows W`` (the gradient of its input).

    Returns:
        ``[S, out]`` or ``[S, in]`` in the dtype of ``rows``.
    """
    stack = _decoded(weight, rows.dtype)
    return grouped_mm(rows, stack.transpose(1, 2) if transposed else stack, offs=ends)


def decoding_product(rows: Tensor, weight: Weight, ends: Tensor, transposed: bool) -> Tensor:
    """Multiply as `stack_product`, weights in 4 bits decoded inside the kernel; dense weights as they are."""
    if not isinstance(weight, NF4Weight):
        return stack_product(rows, weight, ends, transposed)
    from lightning_mixcn.model.kernels.nf4_product import nf4_product

    return nf4_product(rows, weight.packed(), weight.shape, ends, transposed)


def outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return each expert's ``leftᵀ right``, ``[S, n]`` and ``[S, m]`` to ``[E, n, m]``; 0 for one without rows."""
    product = grouped_mm(left.t(), right, offs=ends)
    # Some backends do not write a group without rows.
    empty_E = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return product.masked_fill_(empty_E[:, None, None], 0.0)


def _decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, NF4Weight) and weight.codes.is_cuda:
        from lightning_mixcn.model.kernels.nf4_decode import nf4_decode

        return nf4_decode(weight.packed(), dtype)[: prod(weight.shape)].view(weight.shape)
    return weight.flat(dtype).view(weight.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) ⊙ up``, ``[S, I]``."""
    if gate.is_cuda:
        from lightning_mixcn.model.kernels.swiglu import swiglu_kernel

        return swiglu_kernel(gate, up)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate: Tensor, up: Tensor, dh: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return SwiGLU's result again and its gradients; ``dh`` is overwritten.

    Args:
        gate: ``[S, I]``.
        up: ``[S, I]``.
        dh: ``[S, I]``, the gradient of h before it is scaled with the routing weight.
        weight: ``[S]`` in the dtype of ``gate``, the rows' routing weights.

    Returns:
        h, the gradients of gate and up, ``[S, I]``, and ⟨dh, h⟩ ``[S]`` float32, the gradient of the routing weight.
    """
    if gate.is_cuda:
        from lightning_mixcn.model.kernels.swiglu import swiglu_backward_kernel

        return swiglu_backward_kernel(gate, up, dh, weight)
    return swiglu_backward_in_torch(gate, up, dh, weight)


def swiglu_backward_in_torch(
    gate: Tensor, up: Tensor, dh: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `swiglu_backward` in torch's operations, on any device."""
    silu = F.silu(gate)
    h = silu * up
    dweight = torch.sum(h * dh, dim=1, dtype=torch.float32)
    dh.mul_(weight[:, None])
    dup = silu.mul_(dh)
    return h, torch.ops.aten.silu_backward(dh.mul_(up), gate), dup, dweight


def grouped_experts(product: FrozenProduct, *operands: Any) -> Tensor:
    """Compute the block by the paths ``grouped`` and ``decode``.

    Args:
        product: Product with frozen weights, which makes the difference of the two.
        operands: Arguments of `expert_loop`.

    Returns:
        ``[T, H]`` as `expert_loop`.
    """
    return finish(*_GroupedExperts.apply(product, *operands))  # type: ignore[no-untyped-call]  # torch leaves apply untyped


class _GroupedExperts(torch.autograd.Function):
    """All but the output, see `finish`."""

    @staticmethod
    def forward(
        ctx: Any,
        product: FrozenProduct,
        x: Tensor,
        index: Tensor,
        weight: Tensor,
        weights: ExpertWeights,
        dropout: Dropout,
        *factors: Any,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Compute gate and up."""
        lora, (gate, up, down) = ExpertFactors(*factors), weights
        token_S, row_TK, ends_E = route_rows_on_device(index, gate.shape[0])
        x_SH = x[token_S]
        gate_SI = product(x_SH, gate, ends_E, True)
        up_SI = product(x_SH, up, ends_E, True)
        hidden_gate_up = offsets = None
        if lora.a_gate_up is not None:
            dropped = masked(x_SH, dropout.mask(x.shape, 0, x), token_S)
            hidden_gate_up = grouped_mm(dropped, lora.a_gate_up.transpose(1, 2), offs=ends_E)
            for result, b, rank in lora.halves(gate_SI, up_SI):
                result.add_(grouped_mm(hidden_gate_up[:, rank], b.transpose(1, 2), offs=ends_E))
        if lora.a_down is not None and dropout.probability > 0.0:
            # Masks are drawn expert by expert: the one case in which the host must know their rows.
            offsets = [0, *ends_E.tolist()]
        ctx.product, ctx.weights, ctx.dropout, ctx.offsets = product, weights, dropout, offsets
        ctx.save_for_backward(x, weight, gate_SI, up_SI, hidden_gate_up, token_S, row_TK, ends_E, *lora[:-1])

        def output() -> Tensor:
            h_SI = swiglu(gate_SI, up_SI)
            y_SH = product(h_SI, down, ends_E, True)
            if lora.a_down is not None and lora.b_down is not None:
                dropped = masked(h_SI, _hidden_mask(dropout, offsets, h_SI))
                hidden = grouped_mm(dropped, lora.a_down.transpose(1, 2), offs=ends_E)
                y_SH.add_(grouped_mm(hidden, lora.b_down.transpose(1, 2), offs=ends_E))
            return sum_choices(y_SH, row_TK, weight, x.dtype)

        return pending_output(x), output

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the routing weights and the factors."""
        x, weight_TK, gate_SI, up_SI, hidden_gate_up, token_S, row_TK, ends, *factors = ctx.saved_tensors
        lora, (gate, up, down) = ExpertFactors(*factors), ctx.weights
        grad_SH = grad_TH[token_S]
        weight_S = torch.empty_like(weight_TK.flatten())
        weight_S = weight_S.index_copy_(0, row_TK.flatten(), weight_TK.flatten()).to(grad_SH.dtype)
        dh = ctx.product(grad_SH, down, ends, False)
        through_b = mask = da_down = db_down = None
        if lora.a_down is not None and lora.b_down is not None:
            mask = _hidden_mask(ctx.dropout, ctx.offsets, dh)
            through_b = grouped_mm(grad_SH, lora.b_down, offs=ends)
            dh.add_(masked(grouped_mm(through_b, lora.a_down, offs=ends), mask))
        h_SI, dgate, dup, dweight_S = swiglu_backward(gate_SI, up_SI, dh, weight_S)
        if through_b is not None and lora.a_down is not None:
            dropped = masked(h_SI, mask)
            # Made again: saved, it would have recomputation run until there is h.
            hidden_down = grouped_mm(dropped, lora.a_down.transpose(1, 2), offs=ends)
            db_down = outer_product(grad_SH, hidden_down.mul_(weight_S[:, None]), ends)
            da_down = outer_product(through_b * weight_S[:, None], dropped, ends)
            del dropped
        del dh, h_SI, grad_SH
        dx_SH = dx = da_gate_up = None
        if ctx.needs_input_grad[1]:
            dx_SH = ctx.product(dgate, gate, ends, False)
            dx_SH.add_(ctx.product(dup, up, ends, False))
        db: list[Tensor] = []
        if lora.a_gate_up is not None:
            mask_TH = ctx.dropout.mask(x.shape, 0, x)
            through_b = torch.zeros_like(hidden_gate_up)
            for grad, b, rank in lora.halves(dgate, dup):
                through_b[:, rank] = grouped_mm(grad, b, offs=ends)
                db.append(outer_product(grad, hidden_gate_up[:, rank], ends))
            da_gate_up = outer_product(through_b, masked(x[token_S], mask_TH, token_S), ends)
            if dx_SH is not None:
                dx_SH.add_(masked(grouped_mm(through_b, lora.a_gate_up, offs=ends), mask_TH, token_S))
        if dx_SH is not None:
            dx = sum_choices(dx_SH, row_TK, None, dx_SH.dtype)
        dweight = dweight_S[row_TK].to(weight_TK.dtype)
        db_gate, db_up = (None if b is None else db.pop(0) for b in (lora.b_gate, lora.b_up))
        return None, dx, None, dweight, None, None, da_gate_up, db_gate, db_up, da_down, db_down, None


def _hidden_mask(dropout: Dropout, offsets: list[int] | None, like_SI: Tensor) -> Tensor | None:
    """Draw the down projection's mask ``[S, I]``, expert by expert as the loop does."""
    if offsets is None:
        return None
    masks = [
        dropout.mask((stop - start, like_SI.shape[1]), 1 + expert, like_SI)
        for expert, (start, stop) in enumerate(pairwise(offsets))
    ]
    return torch.cat([mask for mask in masks if mask is not None])
