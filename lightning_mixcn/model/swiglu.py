"""SwiGLU and its backward with the routing weight's gradient: one kernel on a GPU, torch's operations elsewhere.

Legend: S rows, I intermediate.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
        from .kernels.swiglu import swiglu as kernel

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
        from .kernels.swiglu import swiglu_backward as kernel

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
