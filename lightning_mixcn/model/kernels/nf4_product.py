"""Grouped product of rows, sorted by expert, with NF4 matrices that are decoded tile by tile inside the kernel.

A program computes one tile of the result: rows of one expert, 64 columns. It finds its expert from the rows' ends on
the device; the host launches as many programs as any routing could need, and those left over return at once.

Legend: S rows, E experts, W one expert's matrix ``[out, in]``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mixcn.model.nf4 import codec as nf4

from .nf4_decode import block_maxima

_TILE = nf4.BLOCK  # of W, both ways: a row of a tile is then in one block where `in` is a multiple of 64


def nf4_product(
    rows: Tensor, packed: nf4.NF4Tensors, shape: tuple[int, int, int], ends: Tensor, transposed: bool
) -> Tensor:
    """Multiply rows with their experts' matrices; sums are in float32, operands in the dtype of ``rows``.

    Args:
        rows: ``[S, in]`` if ``transposed``, else ``[S, out]``; float16, bfloat16 or float32.
        packed: The matrices.
        shape: ``(E, out, in)``; ``in`` is even.
        ends: ``[E]`` int32, the row after each expert's last.
        transposed: ``rows Wᵀ`` (forward), else ``rows W`` (the gradient of its input).

    Returns:
        ``[S, out]`` or ``[S, in]`` in the dtype of ``rows``.
    """
    experts, width_out, width_in = shape
    assert width_in % 2 == 0, f"two codes a byte: a row of {width_in} elements begins inside a byte"
    assert width_out * width_in < 2**31 - nf4.SUPERBLOCK, "places in a matrix are 32-bit numbers"
    count, columns = len(rows), width_out if transposed else width_in
    rows, result = rows.contiguous(), rows.new_empty(count, columns)
    block_rows = min(64, max(16, triton.next_power_of_2(count // experts)))
    grid = (count // block_rows + min(experts, count), triton.cdiv(columns, _TILE))
    tables = nf4.dynamic_code(rows.device), nf4.nf4_code(rows.device)
    with torch.cuda.device_of(rows):  # Triton launches on the current device, whatever its arguments are on
        _product[grid](
            rows, *packed, *tables, ends, result, experts, width_out, width_in,
            EXPERTS=triton.next_power_of_2(experts), TRANSPOSED=transposed, ALIGNED=width_in % nf4.BLOCK == 0,
            BLOCK_ROWS=block_rows, TILE=_TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return result


@triton.jit
def _expert_of(tile, ends, experts, EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Find the expert of a tile of rows (``experts`` if there is none), the tile's first row, and the expert's end."""
    numbers = tl.arange(0, EXPERTS)
    stops = tl.load(ends + numbers, mask=numbers < experts, other=0)
    starts = tl.load(ends + numbers - 1, mask=(numbers > 0) & (numbers < experts), other=0)
    tiles = tl.cdiv(stops - starts, BLOCK_ROWS)
    expert = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (numbers < experts)).to(tl.int32), 0)
    before = tl.sum(tl.where(numbers < expert, tiles, 0), 0)
    start = tl.sum(tl.where(numbers == expert, starts, 0), 0)
    stop = tl.sum(tl.where(numbers == expert, stops, 0), 0)
    return expert, start + (tile - before) * BLOCK_ROWS, stop


@triton.jit
def _weight_tile(
    first, row, column, width_out, width_in, codes, scales, super_scale, super_offset, dynamic_code, table,
    ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Decode W[row, column : column + TILE] to float32; ``first`` is W's first element in its first superblock."""
    pair = column + 2 * tl.arange(0, TILE // 2)
    element = first + row[:, None] * width_in + pair[None, :]
    inside = (row < width_out)[:, None] & (pair < width_in)[None, :]
    pairs = tl.load(codes + element // 2, mask=inside, other=0)
    if ALIGNED:
        block = (first + row * width_in + column) // 64
        maxima = block_maxima(block, scales, super_scale, super_offset, dynamic_code, row < width_out)[:, None]
    else:
        maxima = block_maxima(element // 64, scales, super_scale, super_offset, dynamic_code, inside)
    return _element_values(pairs, maxima, table)


@triton.jit
def _element_values(codes, maxima, table):
    """Decode as `element_values`, from a table in registers: a load of four bytes in a loop becomes a `cp.async`."""
    codes = codes.to(tl.int32)
    size: tl.constexpr = codes.shape[0] * codes.shape[1]
    earlier = tl.gather(table, tl.reshape(codes >> 4, (size,)), 0)
    later = tl.gather(table, tl.reshape(codes & 15, (size,)), 0)
    return tl.interleave(tl.reshape(earlier, codes.shape) * maxima, tl.reshape(later, codes.shape) * maxima)


@triton.jit
def _product(
    rows, codes, scales, super_scale, super_offset, dynamic_code, nf4_code, ends, result, experts, width_out, width_in,
    EXPERTS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    expert, row, stop = _expert_of(tl.program_id(0), ends, experts, EXPERTS, BLOCK_ROWS)
    if expert >= experts:
        return
    element = expert.to(tl.int64) * width_out * width_in
    superblock, first = element // 16384, (element % 16384).to(tl.int32)
    codes, scales = codes + superblock * 8192, scales + superblock * 256
    super_scale, super_offset = super_scale + superblock, super_offset + superblock
    row = (row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column, inner = tl.program_id(1) * TILE, tl.arange(0, TILE)
    width, columns = (width_in, width_out) if TRANSPOSED else (width_out, width_in)
    total = tl.zeros((BLOCK_ROWS, TILE), dtype=tl.float32)
    table = tl.load(nf4_code + tl.arange(0, 16))
    for start in range(0, width, TILE):
        place, inside = rows + row * width + start + inner[None, :], (row < stop) & (start + inner < width)[None, :]
        left = tl.load(place, mask=inside, other=0.0)
        tile = _weight_tile(
            first, (column if TRANSPOSED else start) + inner, start if TRANSPOSED else column, width_out, width_in,
            codes, scales, super_scale, super_offset, dynamic_code, table, ALIGNED, TILE,
        ).to(left.dtype)  # fmt: skip
        total = tl.dot(left, tl.trans(tile) if TRANSPOSED else tile, total, input_precision="ieee")
    place, inside = result + row * columns + column + inner[None, :], (row < stop) & (column + inner < columns)[None, :]
    tl.store(place, total.to(result.dtype.element_ty), mask=inside)
