"""Cross-entropy of rows of logits, and its gradient in their place: a row is read twice and written once.

Inside, all is float32. `head` has the formulas in torch.

Legend: C positions of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits that a program reads at a time


def cross_entropy(
    logits: Tensor, target: Tensor, grad: Tensor | None = None, wants_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Compute each row's negative log-likelihood, and the gradient of the logits.

    Args:
        logits: ``[C, V]``, contiguous; overwritten with the gradient if that is wanted.
        target: ``[C]`` int64, from 0 to V - 1.
        grad: ``[C]``, the gradient of the result; ``None`` for 1.
        wants_gradient: The gradient is wanted.

    Returns:
        float32 ``[C]``, and ``logits`` if it is the gradient now.
    """
    assert logits.is_contiguous()
    assert target.is_contiguous()
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    found = nll, logits if wants_gradient else None
    if logits.is_meta or len(logits) == 0:
        return found
    with torch.cuda.device_of(logits):  # Triton launches on the current device, whatever its arguments are on
        _cross_entropy[(len(logits),)](
            logits, target, nll if grad is None else grad.contiguous(), nll, logits.shape[1],
            GRADIENT=wants_gradient, SCALED=grad is not None, BLOCK=_BLOCK,
        )  # fmt: skip
    return found


@triton.jit
def _cross_entropy(
    logits, target, grad, nll, width, GRADIENT: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    column = tl.arange(0, BLOCK)
    # Read before the first maximum, at which a program's warps wait for each other: the gradient is written after it.
    label = tl.load(target + row)
    wanted = tl.load(start + label).to(tl.float32)
    largest, total = -float("inf"), 0.0
    for first in range(0, width, BLOCK):
        values = tl.load(start + first + column, mask=first + column < width, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), 0)
        largest = larger
    tl.store(nll + row, tl.log(total) - (wanted - largest))
    if GRADIENT:
        factor = 1.0
        if SCALED:
            factor = tl.load(grad + row).to(tl.float32)
        for first in range(0, width, BLOCK):
            inside = first + column < width
            values = tl.load(start + first + column, mask=inside, other=0.0).to(tl.float32)
            difference = tl.exp(values - largest) / total - tl.where(first + column == label, 1.0, 0.0)
            tl.store(start + first + column, (difference * factor).to(logits.dtype.element_ty), mask=inside)
