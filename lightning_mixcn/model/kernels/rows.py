"""Gathering of tokens' rows for an expert, and summing of tokens' choices, each in one pass; dropout included.

Legend: T tokens, H hidden, K experts a token, S = T·K routed rows, n rows of one expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import COLUMNS, RUN, Drop, kept, random_words

_ROWS = 8  # of a program: with `RUN` columns, eight numbers a thread, 16 bytes of a 16-bit type


def gather_rows(x: Tensor, token: Tensor, out: Tensor | None, dropped: Tensor | None, drop: Drop) -> None:
    """Copy the rows ``x[token]``, and write them with dropout.

    Args:
        x: ``[T, H]``, contiguous.
        token: ``[n]`` int64.
        out: ``[n, H]``, rows contiguous, for the rows as they are; or not wanted.
        dropped: ``[n, H]``, rows contiguous, for the rows after dropout of stream 0; or not wanted.
        drop: Probability and seed.
    """
    assert x.is_contiguous()
    rows, width = len(token), x.shape[1]
    if x.is_meta or rows == 0:
        return
    outputs = x if out is None else out, x if dropped is None else dropped
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        _gather[(triton.cdiv(rows, _ROWS), triton.cdiv(width, COLUMNS))](
            x, token, *outputs, outputs[0].stride(0), outputs[1].stride(0), rows, width, *drop,
            PLAIN=out is not None, DROPPED=dropped is not None, ROWS=_ROWS, RUN=RUN,
        )  # fmt: skip


def sum_rows(
    rows: Tensor, row: Tensor, weight: Tensor | None, through_dropout: Tensor | None = None, drop: Drop | None = None
) -> Tensor:
    """Sum weight · row over each token's K rows, in float32 and in the order of k.

    Args:
        rows: ``[S, H]``, rows contiguous.
        row: ``[T, K]`` int64, the row of a token's k-th choice.
        weight: ``[T, K]``, float32 or the dtype of ``rows``; ``None``: 1.
        through_dropout: ``[S, H]``, rows contiguous, more rows, whose sum is multiplied with the token's dropout mask
            of stream 0 and added.
        drop: Probability and seed, with ``through_dropout``.

    Returns:
        ``[T, H]`` in the dtype of ``rows``.
    """
    (tokens, choices), width = row.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if rows.is_meta or tokens == 0:
        return out
    more = rows if through_dropout is None else through_dropout
    with torch.cuda.device_of(rows):
        _sum[(triton.cdiv(tokens, _ROWS), triton.cdiv(width, COLUMNS))](
            rows, row.contiguous(), row if weight is None else weight.contiguous(), more, out,
            rows.stride(0), more.stride(0), tokens, width, *(drop or Drop(0, 0, 1.0)),
            CHOICES=choices, WEIGHTED=weight is not None, MORE=through_dropout is not None,
            DROPPED=drop is not None and drop.threshold > 0, ROWS=_ROWS, RUN=RUN,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["seed", "rows", "threshold"])
def _gather(
    x, token, out, dropped, out_stride, dropped_stride, rows, width, seed, threshold, scale,
    PLAIN: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    number = tl.load(token + row, mask=row < rows, other=0)
    place = row.to(tl.int64)[:, None]
    if DROPPED:
        words = random_words(seed, tile * 0, number, tile, RUN)
    for word in tl.static_range(4):
        column = ((tile * 4 + word) * RUN + tl.arange(0, RUN))[None, :]
        inside = (row < rows)[:, None] & (column < width)
        values = tl.load(x + number[:, None] * width + column, mask=inside, other=0.0)
        if PLAIN:
            tl.store(out + place * out_stride + column, values, mask=inside)
        if DROPPED:
            values = values.to(tl.float32) * kept(words[word], threshold, scale)
            tl.store(dropped + place * dropped_stride + column, values.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "tokens", "threshold"])
def _sum(
    rows, row, weight, more, out, stride, more_stride, tokens, width, seed, threshold, scale,
    CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, MORE: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    if DROPPED:
        words = random_words(seed, tile * 0, token, tile, RUN)
    for word in tl.static_range(4):
        column = ((tile * 4 + word) * RUN + tl.arange(0, RUN))[None, :]
        inside = (token < tokens)[:, None] & (column < width)
        total = tl.zeros((ROWS, RUN), dtype=tl.float32)
        through = tl.zeros((ROWS, RUN), dtype=tl.float32)
        for choice in tl.static_range(CHOICES):
            number = tl.load(row + token * CHOICES + choice, mask=token < tokens, other=0)[:, None]
            values = tl.load(rows + number * stride + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                factor = tl.load(weight + token * CHOICES + choice, mask=token < tokens, other=0.0)
                values *= factor.to(tl.float32)[:, None]
            total += values
            if MORE:
                through += tl.load(more + number * more_stride + column, mask=inside, other=0.0).to(tl.float32)
        if DROPPED:
            through *= kept(words[word], threshold, scale)
        place = token.to(tl.int64)[:, None] * width + column
        tl.store(out + place, (total + through).to(out.dtype.element_ty), mask=inside)
