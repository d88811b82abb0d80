"""Compute an expert block's output after all that backward needs is saved, so that recomputation leaves it out.

`torch.utils.checkpoint` runs a function again only until as many tensors are saved as were the first time (its early
stop). An autograd function saves when its forward returns. So a path of the block is two of them: one computes and
saves what backward needs, and its backward is that of the whole block; `finish` computes the output, saves nothing, and
passes the gradient on. The layer saves nothing after its experts. Recomputing it ends before `finish`: the down
product and the sum of choices are left out. Where something does save a tensor after the block, it runs as always.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pending_output(like: Tensor) -> Tensor:
    """Return what stands for the output in autograd's graph: shape and type of ``like``, memory of one number."""
    return like.new_empty(()).expand(like.shape)


def finish(pending: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Compute the output.

    Args:
        pending: `pending_output` of the function that has saved what backward needs.
        compute: Returns the output, in the shape and type of ``pending``; it is called once, without gradients.

    Returns:
        The output; its gradient is that of ``pending``.
    """
    y: Tensor = _Finish.apply(pending, compute)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return y


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
