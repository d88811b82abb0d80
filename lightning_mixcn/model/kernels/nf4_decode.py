"""Decoding our superblocks of NF4, scales and codes in one kernel; see `nf4` for the format.

The result is bitsandbytes' bit for bit: products and sums are rounded one by one in float32 (no fused multiply-add),
then once to the result's dtype.

Legend: N superblocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mixcn.model.nf4 import codec as nf4

# Blocks of 64 elements that one program decodes: a fourth of a superblock.
_BLOCKS = 64


def nf4_decode(packed: nf4.NF4Tensors, dtype: torch.dtype) -> Tensor:
    """Decode superblocks, as `nf4.dequantize_nf4` does with one kernel for each level.

    Args:
        packed: N superblocks.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``[N * 16384]`` in ``dtype``, padding included.
    """
    values = torch.empty(len(packed.codes) * nf4.SUPERBLOCK, dtype=dtype, device=packed.codes.device)
    grid = (values.numel() // (_BLOCKS * nf4.BLOCK),)
    tables = nf4.dynamic_code(values.device), nf4.nf4_code(values.device)
    with torch.cuda.device_of(values):  # Triton launches on the current device, whatever its arguments are on
        _decode[grid](*packed, *tables, values, BLOCKS=_BLOCKS, enable_fp_fusion=False)
    return values


@triton.jit
def block_maxima(block, scales, super_scale, super_offset, dynamic_code, mask):
    """Return the absolute maxima of the blocks numbered ``block`` (any shape), float32; 0 where masked."""
    scale = tl.load(dynamic_code + tl.load(scales + block, mask=mask, other=0).to(tl.int32))
    superblock = block // 256
    factor = tl.load(super_scale + superblock, mask=mask, other=0.0)
    return scale * factor + tl.load(super_offset + superblock, mask=mask, other=0.0)


@triton.jit
def element_values(codes, maxima, nf4_code):
    """Decode codes ``[R, C]``, two a byte, with blocks' maxima ``[R, C]`` or ``[R, 1]`` to ``[R, 2 C]`` float32."""
    codes = codes.to(tl.int32)
    earlier = tl.load(nf4_code + (codes >> 4)) * maxima
    later = tl.load(nf4_code + (codes & 15)) * maxima
    return tl.interleave(earlier, later)


@triton.jit
def _decode(codes, scales, super_scale, super_offset, dynamic_code, nf4_code, values, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    maxima = block_maxima(block, scales, super_scale, super_offset, dynamic_code, block >= 0)
    pairs = tl.load(codes + block[:, None] * 32 + tl.arange(0, 32)[None, :])
    decoded = element_values(pairs, maxima[:, None], nf4_code)
    places = values + block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(places, decoded.to(values.dtype.element_ty))
