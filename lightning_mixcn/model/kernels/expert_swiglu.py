"""SwiGLU of one expert's rows with the dropout of its adapter, forward and backward, in one pass each.

Inside, all is float32. Gate and up are the halves of one product's rows.

Legend: n rows of one expert, I intermediate, R LoRA rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import COLUMNS, RUN, Drop, kept, random_words

_ROWS = 8


def expert_swiglu(gate_up: Tensor, token: Tensor, expert: int, drop: Drop, h: Tensor, dropped: Tensor | None) -> None:
    """Compute ``silu(gate) ⊙ up``, and again with dropout.

    Args:
        gate_up: ``[n, 2 I]``, rows contiguous.
        token: ``[n]`` int64, what the dropout is drawn by, with ``expert``.
        expert: Number of the expert.
        drop: Probability and seed.
        h: ``[n, I]`` for the result, rows contiguous.
        dropped: ``[n, I]`` for the result after dropout, rows contiguous; or not wanted.
    """
    rows, width = len(token), h.shape[1]
    if gate_up.is_meta or rows == 0:
        return
    more = h if dropped is None else dropped
    with torch.cuda.device_of(h):  # Triton launches on the current device, whatever its arguments are on
        _forward[(triton.cdiv(rows, _ROWS), triton.cdiv(width, COLUMNS))](
            gate_up, token, h, more, gate_up.stride(0), h.stride(0), more.stride(0), rows, width, 1 + expert, *drop,
            DROPPED=dropped is not None, ROWS=_ROWS, RUN=RUN,
        )  # fmt: skip


def expert_swiglu_backward(
    gate_up: Tensor,
    dh: Tensor,
    through_lora: Tensor | None,
    weight: Tensor,
    token: Tensor,
    expert: int,
    drop: Drop,
    dweight: Tensor,
    adapted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of gate and up, and h again for the factor that reads it.

    Args:
        gate_up: ``[n, 2 I]``, rows contiguous.
        dh: ``[n, I]``, rows contiguous, the gradient of h through the frozen matrix before it is scaled with the
            routing weight.
        through_lora: ``[n, I]``, rows contiguous, the gradient of h after dropout, through the adapter; ``None`` where
            there is none, or where nothing is dropped and ``dh`` has it.
        weight: ``[n]`` float32, the rows' routing weights.
        token: ``[n]`` int64.
        expert: Number of the expert.
        drop: Probability and seed, as in forward.
        dweight: ``[n, tiles]`` float32, contiguous, for ⟨dh, h⟩ of each tile of `COLUMNS` columns.
        adapted: A factor reads h.

    Returns:
        The gradients of gate and up ``[n, 2 I]``, and weight · dropout(h) ``[n, I]`` if ``adapted``.
    """
    rows, width = dh.shape
    dgate_up = gate_up.new_empty(rows, 2 * width)
    dropped = gate_up.new_empty(rows, width) if adapted else None
    if gate_up.is_meta or rows == 0:
        return dgate_up, dropped
    more, again = dh if through_lora is None else through_lora, dh if dropped is None else dropped
    with torch.cuda.device_of(dh):
        _backward[(triton.cdiv(rows, _ROWS), triton.cdiv(width, COLUMNS))](
            gate_up, dh, more, weight, token, dgate_up, again, dweight, gate_up.stride(0), dh.stride(0),
            more.stride(0), rows, width, 1 + expert, *drop,
            LORA=through_lora is not None, AGAIN=adapted, DROPPED=drop.threshold > 0, ROWS=_ROWS, RUN=RUN,
        )  # fmt: skip
    return dgate_up, dropped


@triton.jit(do_not_specialize=["seed", "rows", "stream", "threshold"])
def _forward(
    gate_up, token, h, dropped, stride, h_stride, dropped_stride, rows, width, stream, seed, threshold, scale,
    DROPPED: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    place = row.to(tl.int64)[:, None]
    if DROPPED:
        words = random_words(seed, stream, tl.load(token + row, mask=row < rows, other=0), tile, RUN)
    for word in tl.static_range(4):
        column = ((tile * 4 + word) * RUN + tl.arange(0, RUN))[None, :]
        inside = (row < rows)[:, None] & (column < width)
        g = tl.load(gate_up + place * stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(gate_up + place * stride + width + column, mask=inside, other=0.0).to(tl.float32)
        value = (g * tl.sigmoid(g) * u).to(h.dtype.element_ty)
        tl.store(h + place * h_stride + column, value, mask=inside)
        if DROPPED:
            value = (value.to(tl.float32) * kept(words[word], threshold, scale)).to(h.dtype.element_ty)
            tl.store(dropped + place * dropped_stride + column, value, mask=inside)


@triton.jit(do_not_specialize=["seed", "rows", "stream", "threshold"])
def _backward(
    gate_up, dh, through_lora, weight, token, dgate_up, dropped, dweight, stride, dh_stride, lora_stride, rows, width,
    stream, seed, threshold, scale, LORA: tl.constexpr, AGAIN: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    place = row.to(tl.int64)[:, None]
    routing = tl.load(weight + row, mask=row < rows, other=0.0)[:, None]
    inner = tl.zeros((ROWS,), dtype=tl.float32)
    if (LORA or AGAIN) and DROPPED:
        words = random_words(seed, stream, tl.load(token + row, mask=row < rows, other=0), tile, RUN)
    for word in tl.static_range(4):
        column = ((tile * 4 + word) * RUN + tl.arange(0, RUN))[None, :]
        inside = (row < rows)[:, None] & (column < width)
        g = tl.load(gate_up + place * stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(gate_up + place * stride + width + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dh + place * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        value = silu * u
        factor = kept(words[word], threshold, scale) if (LORA or AGAIN) and DROPPED else 1.0
        if LORA:
            d += tl.load(through_lora + place * lora_stride + column, mask=inside, other=0.0).to(tl.float32) * factor
        if AGAIN:
            again = value * routing * factor
            tl.store(dropped + place * width + column, again.to(dropped.dtype.element_ty), mask=inside)
        inner += tl.sum(value * d, 1)
        d *= routing
        tl.store(dgate_up + place * 2 * width + width + column, (d * silu).to(dgate_up.dtype.element_ty), mask=inside)
        # silu'(g) = σ(g) (1 + g (1 - σ(g)))
        d *= u * sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(dgate_up + place * 2 * width + column, d.to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(dweight + row * tl.num_programs(1) + tile, inner, mask=row < rows)
