"""Products of rows that are sorted by expert with their experts' matrices, all in one call.

Legend: S rows, E experts, ``ends [E]`` int32 the row behind each expert's last.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from .weights import NF4Weight, Weight

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
    from .kernels.nf4_product import nf4_product

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
        from .kernels.nf4_decode import nf4_decode

        return nf4_decode(weight.packed(), dtype)[: prod(weight.shape)].view(weight.shape)
    return weight.flat(dtype).view(weight.shape)
