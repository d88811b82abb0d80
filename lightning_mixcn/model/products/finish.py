"""Compute an output after all that backward needs is saved, so that recomputation leaves it out.

`torch.utils.checkpoint` runs a function again only until as many tensors are saved as were the first time (its early
stop). An autograd function saves when its forward returns. So what ends a part that is computed again is two of them:
one computes and saves what backward needs, and its backward is that of both; `finish` computes the output, saves
nothing, and passes the gradient on. A layer saves nothing after its experts. Recomputing it ends before `finish`: the
down product and the sum of choices are left out; of attention, where it is fused, the output projection. Where
something does save a tensor after that, it runs as always.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pending_output(like: Tensor, width: int | None = None) -> Tensor:
    """Return what stands for the output in autograd's graph, with memory of one number.

    Args:
        like: ``[..., H]``, whose type and shape it has.
        width: In place of H.
    """
    return like.new_empty(()).expand(*like.shape[:-1], like.shape[-1] if width is None else width)


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
