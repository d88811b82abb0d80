"""The expert block with grouped products: all experts in one call, and the host never knows who has how many rows.

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, R LoRA rank, S = T·K routed rows.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import grouped_mm

from lightning_mixcn.model.nf4.storage import NF4Weight, Weight

from .operands import (
    BlockGradients,
    BlockInputs,
    Dropout,
    ExpertFactors,
)
from .routing import route_rows_on_device, sum_choices

# (rows [S, in], frozen weights [E, out, in], ends, transposed) → [S, out]: rows Wᵀ where transposed, else, for rows
# [S, out], rows W as [S, in].
FrozenProduct = Callable[[Tensor, Weight, Tensor, bool], Tensor]


def stack_product(rows: Tensor, weight: Weight, ends: Tensor, transposed: bool) -> Tensor:
    """Decode the whole stack, then multiply; the stack lives for this call only.

    Args:
        rows: ``[S, in]`` if ``transposed``, else ``[S, out]``.
        weight: The frozen matrices ``[E, out, in]``.
        ends: See the module's docstring.
        transposed: ``rows Wᵀ`` (forward), else ``rows W`` (the gradient of its input).

    Returns:
        ``[S, out]`` or ``[S, in]`` in the dtype of ``rows``.
    """
    stack = _decoded(weight, rows.dtype)
    return grouped_mm(rows, stack.transpose(1, 2) if transposed else stack, offs=ends)


def decoding_product(rows: Tensor, weight: Weight, ends: Tensor, transposed: bool) -> Tensor:
    """The same with weights in 4 bits decoded inside the kernel; dense weights as they are."""
    if not isinstance(weight, NF4Weight):
        return stack_product(rows, weight, ends, transposed)
    from lightning_mixcn.model.kernels.nf4_product import nf4_product

    return nf4_product(rows, weight.packed(), weight.shape, ends, transposed)


def factor_product(rows: Tensor, factor: Tensor, ends: Tensor) -> Tensor:
    """``[S, n]`` with ``[E, n, m]`` (may be a transposed view) to ``[S, m]``."""
    return grouped_mm(rows, factor, offs=ends)


def outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Each expert's ``leftᵀ right`` over its rows, ``[S, n]`` and ``[S, m]`` to ``[E, n, m]``; 0 without rows."""
    product = grouped_mm(left.t(), right, offs=ends)
    # Whether a group without rows is written is a matter of the backend.
    empty_E = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return product.masked_fill_(empty_E[:, None, None], 0.0)


def _decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, NF4Weight) and weight.codes.is_cuda:
        from lightning_mixcn.model.kernels.nf4_decode import nf4_decode

        return nf4_decode(weight.packed(), dtype)[: prod(weight.shape)].view(weight.shape)
    return weight.flat(dtype).view(weight.shape)


class SwigluGradients(NamedTuple):
    """What one pass over the rows gives.

    Args:
        h: ``[S, I]``, SwiGLU's result again.
        gate: ``[S, I]``, the gradient of the gate projection's result.
        up: ``[S, I]``, that of the up projection's.
        weight: ``[S]`` float32, ⟨dh, h⟩: the gradient of the row's routing weight.
    """

    h: Tensor
    gate: Tensor
    up: Tensor
    weight: Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) ⊙ up``, ``[S, I]``."""
    if gate.is_cuda:
        from lightning_mixcn.model.kernels.swiglu import swiglu as kernel

        return kernel(gate, up)
    return swiglu_of_torch(gate, up)


def swiglu_backward(gate: Tensor, up: Tensor, dh: Tensor, weight: Tensor) -> SwigluGradients:
    """Gradients; ``dh`` is used up.

    Args:
        gate: ``[S, I]``.
        up: ``[S, I]``.
        dh: ``[S, I]``, the gradient of h before it is scaled with the routing weight.
        weight: ``[S]`` in the dtype of ``gate``, the rows' routing weights.

    Returns:
        See `SwigluGradients`.
    """
    if gate.is_cuda:
        from lightning_mixcn.model.kernels.swiglu import swiglu_backward as kernel

        return SwigluGradients(*kernel(gate, up, dh, weight))
    return swiglu_backward_of_torch(gate, up, dh, weight)


def swiglu_of_torch(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in torch's operations."""
    return F.silu(gate).mul_(up)


def swiglu_backward_of_torch(gate: Tensor, up: Tensor, dh: Tensor, weight: Tensor) -> SwigluGradients:
    """`swiglu_backward` in torch's operations."""
    silu = F.silu(gate)
    h = silu * up
    dweight = torch.sum(h * dh, dim=1, dtype=torch.float32)
    dh.mul_(weight[:, None])
    dup = silu.mul_(dh)
    return SwigluGradients(h, torch.ops.aten.silu_backward(dh.mul_(up), gate), dup, dweight)


class _Kept(NamedTuple):
    """What backward needs beside the inputs.

    Args:
        gate: ``[S, I]``, the gate projection's result.
        up: ``[S, I]``, the up projection's.
        hidden_gate_up: ``[S, R_gate + R_up]``, the products with LoRA's A.
        hidden_down: ``[S, R_down]``.
        token: ``[S]``, see `DeviceRouting`.
        row: ``[T, K]``.
        ends: ``[E]``.
    """

    gate: Tensor
    up: Tensor
    hidden_gate_up: Tensor | None
    hidden_down: Tensor | None
    token: Tensor
    row: Tensor
    ends: Tensor


class GroupedExperts:
    """See the module's docstring, and `expert_path.ExpertPath` for the two calls.

    Args:
        product: What multiplies rows with frozen weights.
    """

    def __init__(self, product: FrozenProduct) -> None:
        self.product = product

    def forward(self, inputs: BlockInputs, index: Tensor) -> tuple[Tensor, _Kept, list[int] | None]:
        """Run the block."""
        x, weight, weights, dropout, lora = inputs
        token_S, row_TK, ends_E = route_rows_on_device(index, weights.gate.shape[0])
        x_SH = x[token_S]
        gate_SI = self.product(x_SH, weights.gate, ends_E, True)
        up_SI = self.product(x_SH, weights.up, ends_E, True)
        hidden_gate_up = hidden_down = offsets = None
        if lora.a_gate_up is not None:
            dropped = _times(x_SH, dropout.mask(x.shape, 0, x), token_S)
            hidden_gate_up = factor_product(dropped, lora.a_gate_up.transpose(1, 2), ends_E)
            for result, b, rank in _halves(gate_SI, up_SI, lora):
                result.add_(factor_product(hidden_gate_up[:, rank], b.transpose(1, 2), ends_E))
        h_SI = swiglu(gate_SI, up_SI)
        y_SH = self.product(h_SI, weights.down, ends_E, True)
        if lora.a_down is not None and lora.b_down is not None:
            # Masks are drawn expert by expert: the one case in which the host must know their rows.
            offsets = [0, *ends_E.tolist()] if dropout.probability > 0.0 else None
            dropped = _times(h_SI, _hidden_mask(dropout, offsets, h_SI))
            hidden_down = factor_product(dropped, lora.a_down.transpose(1, 2), ends_E)
            y_SH.add_(factor_product(hidden_down, lora.b_down.transpose(1, 2), ends_E))
        kept = _Kept(gate_SI, up_SI, hidden_gate_up, hidden_down, token_S, row_TK, ends_E)
        return sum_choices(y_SH, row_TK, weight, x.dtype), kept, offsets

    def backward(
        self, inputs: BlockInputs, kept: Sequence[Any], offsets: list[int] | None, grad_TH: Tensor, needs_dx: bool
    ) -> BlockGradients:
        """Gradients of the inputs, from what `forward` gave."""
        state, weight_TK, lora = _Kept(*kept), inputs.weight, inputs.lora
        grad_SH = grad_TH[state.token]
        weight_S = torch.empty_like(weight_TK.flatten())
        weight_S = weight_S.index_copy_(0, state.row.flatten(), weight_TK.flatten()).to(grad_SH.dtype)
        dh = self.product(grad_SH, inputs.weights.down, state.ends, False)
        through_b = mask = da_down = db_down = None
        if lora.a_down is not None and lora.b_down is not None:
            mask = _hidden_mask(inputs.dropout, offsets, dh)
            through_b = factor_product(grad_SH, lora.b_down, state.ends)
            dh.add_(_times(factor_product(through_b, lora.a_down, state.ends), mask))
        h_SI, dgate, dup, dweight_S = swiglu_backward(state.gate, state.up, dh, weight_S)
        if through_b is not None and state.hidden_down is not None:
            db_down = outer_product(grad_SH, state.hidden_down * weight_S[:, None], state.ends)
            da_down = outer_product(through_b * weight_S[:, None], _times(h_SI, mask), state.ends)
        del dh, h_SI, grad_SH
        dx_SH, da_gate_up, db_gate, db_up = self._gate_up(inputs, state, dgate, dup, needs_dx)
        dx = None if dx_SH is None else sum_choices(dx_SH, state.row, None, dx_SH.dtype)
        dweight = dweight_S[state.row].to(weight_TK.dtype)
        return BlockGradients(dx, dweight, ExpertFactors(da_gate_up, db_gate, db_up, da_down, db_down))

    def _gate_up(
        self, inputs: BlockInputs, state: _Kept, dgate: Tensor, dup: Tensor, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the gathered rows ``[S, H]``, and of A and the Bs."""
        x, _, weights, dropout, lora = inputs
        dx_SH = None
        if needs_dx:
            dx_SH = self.product(dgate, weights.gate, state.ends, False)
            dx_SH.add_(self.product(dup, weights.up, state.ends, False))
        if lora.a_gate_up is None or state.hidden_gate_up is None:
            return dx_SH, None, None, None
        mask_TH = dropout.mask(x.shape, 0, x)
        through_b, db = torch.zeros_like(state.hidden_gate_up), []
        for grad, b, rank in _halves(dgate, dup, lora):
            through_b[:, rank] = factor_product(grad, b, state.ends)
            db.append(outer_product(grad, state.hidden_gate_up[:, rank], state.ends))
        da = outer_product(through_b, _times(x[state.token], mask_TH, state.token), state.ends)
        if dx_SH is not None:
            dx_SH.add_(_times(factor_product(through_b, lora.a_gate_up, state.ends), mask_TH, state.token))
        db_gate = db.pop(0) if lora.b_gate is not None else None
        return dx_SH, da, db_gate, db.pop(0) if lora.b_up is not None else None


def _halves(gate: Tensor, up: Tensor, lora: ExpertFactors) -> list[tuple[Tensor, Tensor, slice]]:
    """The projections that have an adapter: a tensor of theirs, their B, and their columns of A's product."""
    column, found = 0, []
    for tensor, b in ((gate, lora.b_gate), (up, lora.b_up)):
        if b is not None:
            found.append((tensor, b, slice(column, column + b.shape[2])))
            column += b.shape[2]
    return found


def _hidden_mask(dropout: Dropout, offsets: list[int] | None, like_SI: Tensor) -> Tensor | None:
    """The down projection's mask ``[S, I]``, expert by expert as the loop draws it."""
    if offsets is None:
        return None
    masks = [
        dropout.mask((stop - start, like_SI.shape[1]), 1 + expert, like_SI)
        for expert, (start, stop) in enumerate(pairwise(offsets))
    ]
    return torch.cat([mask for mask in masks if mask is not None])


def _times(rows: Tensor, mask: Tensor | None, token: Tensor | None = None) -> Tensor:
    if mask is None:
        return rows
    return rows * (mask if token is None else mask[token])
