"""SwiGLU and its backward in one pass each; inside, all is float32. `experts.grouped` has the formulas in torch.

Legend: S rows, I intermediate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def swiglu_kernel(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``silu(gate) ⊙ up``.

    Args:
        gate: ``[S, I]``, contiguous.
        up: ``[S, I]``, contiguous.

    Returns:
        ``[S, I]`` in the dtype of ``gate``.
    """
    assert gate.is_contiguous()
    assert up.is_contiguous()
    h = torch.empty_like(gate)
    with torch.cuda.device_of(gate):  # Triton launches on the current device, whatever its arguments are on
        _forward[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, h, gate.numel(), BLOCK=_BLOCK)
    return h


def swiglu_backward_kernel(
    gate: Tensor, up: Tensor, dh: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients, and h again for the LoRA factor that reads it.

    Args:
        gate: ``[S, I]``, contiguous.
        up: ``[S, I]``, contiguous.
        dh: ``[S, I]``, contiguous, before it is scaled with the routing weight; overwritten with the gate's gradient.
        weight: ``[S]``, the rows' routing weights.

    Returns:
        h ``[S, I]``, the gradients of gate and up ``[S, I]``, and ⟨dh, h⟩ ``[S]`` float32.
    """
    assert all(tensor.is_contiguous() for tensor in (gate, up, dh))
    h, dup = torch.empty_like(gate), torch.empty_like(gate)
    dweight = torch.empty(len(gate), dtype=torch.float32, device=gate.device)
    with torch.cuda.device_of(gate):
        _backward[(len(gate),)](gate, up, dh, weight, h, dup, dweight, gate.shape[1], BLOCK=_BLOCK)
    return h, dh, dup, dweight


@triton.jit
def _forward(gate, up, h, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + place, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, dh, weight, h, dup, dweight, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row).to(tl.float32)
    inner = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place, inside = row * width + column, column < width
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dh + place, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        inner += silu * u * d
        d *= scale
        tl.store(h + place, (silu * u).to(h.dtype.element_ty), mask=inside)
        tl.store(dup + place, (d * silu).to(dup.dtype.element_ty), mask=inside)
        # silu'(g) = σ(g) (1 + g (1 - σ(g)))
        tl.store(dh + place, (d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(dh.dtype.element_ty), mask=inside)
    tl.store(dweight + row, tl.sum(inner, 0))
