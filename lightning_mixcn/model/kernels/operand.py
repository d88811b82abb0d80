"""A decoded matrix with LoRA's B behind its columns: ``[x | x Aᵀ] [W | B]ᵀ = x Wᵀ + x Aᵀ Bᵀ`` in one product.

The decoded numbers are those of `nf4_decode` bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mixcn.model.nf4 import codec as nf4

from .nf4_decode import block_maxima, element_values

_BLOCKS = 64  # of 64 elements that a program decodes
_B_NUMBERS = 4096  # beside a matrix that a program writes


def decode_operand(
    packed: nf4.NF4Tensors,
    shape: tuple[int, int, int],
    index: int,
    out: Tensor,
    b: Tensor | None,
    scale: float,
    column: int,
) -> None:
    """Write one matrix of a stack and, behind it, B.

    Args:
        packed: The stack.
        shape: ``(E, out, in)``; ``in`` is even.
        index: Number of the matrix.
        out: ``[out, in + R]``, rows contiguous, for the result; what is neither W's nor B's becomes 0.
        b: ``[out, r]``, float32 or the dtype of ``out``; ``None``: no columns.
        scale: Factor of B.
        column: Column of B's first, from ``in`` on.
    """
    _, rows, width = shape
    assert width % 2 == 0, f"two codes a byte: a row of {width} elements begins inside a byte"
    assert out.stride(1) == 1
    if out.is_meta:
        return
    decoding = triton.cdiv(rows * width, _BLOCKS * nf4.BLOCK)
    behind, rank = out.shape[1] - width, 0 if b is None else b.shape[1]
    columns = triton.next_power_of_2(max(behind, 1))
    b_rows = max(_B_NUMBERS // columns, 1)
    copying = triton.cdiv(rows, b_rows) if behind else 0
    b_strides = (0, 0) if b is None else b.stride()
    tables = nf4.dynamic_code(out.device), nf4.nf4_code(out.device)
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its arguments are on
        _operand[(decoding + copying,)](
            *packed, *tables, out, out if b is None else b, index * rows * width // 2, rows, width, out.stride(0),
            *b_strides, rank, behind, column, scale, decoding, ALIGNED=width % nf4.BLOCK == 0, BLOCKS=_BLOCKS,
            B_ROWS=b_rows, BEHIND=columns, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["column"])
def _operand(
    codes, scales, super_scale, super_offset, dynamic_code, nf4_code, out, b, first, height, width, stride,
    b_row, b_column, rank, behind, column, scale, decoding,
    ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, B_ROWS: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < decoding:
        _decode_part(
            program, codes, scales, super_scale, super_offset, dynamic_code, nf4_code, out, first, height, width,
            stride, ALIGNED, BLOCKS,
        )  # fmt: skip
    else:
        row = ((program - decoding) * B_ROWS + tl.arange(0, B_ROWS)).to(tl.int64)[:, None]
        place = tl.arange(0, BEHIND)[None, :]
        number = place - (column - width)
        inside = (row < height) & (place < behind)
        known = inside & (number >= 0) & (number < rank)
        values = tl.load(b + row * b_row + number * b_column, mask=known, other=0.0).to(tl.float32) * scale
        tl.store(out + row * stride + width + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _decode_part(
    part, codes, scales, super_scale, super_offset, dynamic_code, nf4_code, out, first, height, width, stride,
    ALIGNED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Decode the matrix's elements from ``part * BLOCKS * 64`` on; ``first`` is its first byte."""
    # Places in the matrix are 32-bit numbers.
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    pair = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = pair < height * width // 2
    pairs = tl.load(codes + first + pair, mask=inside, other=0)
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    if ALIGNED:  # a block is in one row
        known = block * 64 < height * width
        maxima = block_maxima(first // 32 + block, scales, super_scale, super_offset, dynamic_code, known)[:, None]
        row = block * 64 // width
        to = (row.to(tl.int64) * stride + (block * 64 - row * width))[:, None] + tl.arange(0, 64)[None, :]
    else:
        maxima = block_maxima((first + pair) // 32, scales, super_scale, super_offset, dynamic_code, inside)
        row = place // width
        to = row.to(tl.int64) * stride + (place - row * width)
    values = element_values(pairs, maxima, nf4_code)
    tl.store(out + to, values.to(out.dtype.element_ty), mask=place < height * width)
