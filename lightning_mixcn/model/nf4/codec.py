"""NF4 quantisation, local to superblocks of 16,384 elements, in bitsandbytes' numbers.

The format is QLoRA's (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): blocks of 64 elements share one absolute
maximum, and the maxima are themselves quantised to 8 bits. Here that second level never looks outside its superblock,
so any range of superblocks can be quantised, stored, sharded and decoded without the rest of the tensor.

Legend: N = superblocks, 64 elements a block, 256 blocks a superblock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64
BLOCKS_PER_SUPERBLOCK = 256
SUPERBLOCK = BLOCK * BLOCKS_PER_SUPERBLOCK
# Elements quantised at a time on the CPU: what is made of them stays in the caches.
_CPU_CHUNK = 2**18
_ops = torch.ops.bitsandbytes


class NF4Tensors(NamedTuple):
    """The four tensors that hold ``N`` superblocks.

    Args:
        codes: ``[N, 8192]`` uint8, two NF4 codes a byte, the earlier element in the high half.
        scales: ``[N, 256]`` uint8, each block's absolute maximum less the offset, in bitsandbytes' 8-bit dynamic code.
        super_scale: ``[N]`` float32, what ``scales`` is multiplied with.
        super_offset: ``[N]`` float32, what is added to it.
    """

    codes: Tensor
    scales: Tensor
    super_scale: Tensor
    super_offset: Tensor


def superblocks(numel: int) -> int:
    """Return the number of superblocks that hold ``numel`` elements (the last one padded)."""
    return -(-numel // SUPERBLOCK)


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """Return the 256 values of bitsandbytes' 8-bit dynamic code, float32."""
    code: Tensor = bnb.create_dynamic_map()  # type: ignore[no-untyped-call]  # bitsandbytes is untyped
    return code.to(device)


@cache
def nf4_code(device: torch.device) -> Tensor:
    """Return the 16 values of NF4, float32."""
    code: Tensor = bnb.get_4bit_type("nf4", device=device)  # type: ignore[no-untyped-call]  # bitsandbytes is untyped
    return code


def quantize_nf4(values: Tensor) -> NF4Tensors:
    """Quantise a flat run of elements that begins at a superblock's first element.

    Args:
        values: ``[n]`` float32, float16 or bfloat16; float64 is rounded to float32 first. If ``n`` is no multiple of
            16,384, the last superblock is padded with zeros, which take no part in its second-level statistics.

    Returns:
        The superblocks, on the device of ``values``. A slice of whole superblocks gives the slice of the result.
    """
    if values.dtype == torch.float64:  # bitsandbytes' GPU kernels take 16 and 32 bits
        values = values.float()
    num_superblocks, padding = superblocks(values.numel()), -values.numel() % SUPERBLOCK
    if padding:
        values = torch.cat([values, values.new_zeros(padding)])
    codes, absmax = quantize_codes(values)
    absmax_NB = absmax.view(num_superblocks, BLOCKS_PER_SUPERBLOCK)
    total_N = _sum_blocks(absmax_NB)
    offset_N = total_N / BLOCKS_PER_SUPERBLOCK
    if empty_blocks := padding // BLOCK:  # whose maxima are 0
        offset_N[-1] = total_N[-1] / (BLOCKS_PER_SUPERBLOCK - empty_blocks)
        absmax_NB[-1, -empty_blocks:] = offset_N[-1]
    centred = (absmax_NB - offset_N[:, None]).flatten()
    with default_stream(values.device):
        scales, super_scale = _ops.quantize_blockwise(centred, dynamic_code(values.device), BLOCKS_PER_SUPERBLOCK)
    return NF4Tensors(
        codes.view(num_superblocks, SUPERBLOCK // 2), scales.view(num_superblocks, -1), super_scale.float(), offset_N
    )


@contextmanager
def default_stream(device: torch.device) -> Iterator[None]:
    """Let a GPU's default stream wait for the current one, and the current one for it afterwards.

    bitsandbytes launches the kernels that quantise on the default stream, whatever stream is the current one.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    yield
    current.wait_stream(default)


def _sum_blocks(absmax_NB: Tensor) -> Tensor:
    """Add up each superblock's maxima, in one order.

    That of ``sum`` depends on the device, and on a GPU on the number of superblocks that a rank holds, too.
    """
    while (half := absmax_NB.shape[1] // 2) > 0:
        absmax_NB = absmax_NB[:, :half] + absmax_NB[:, half:]
    return absmax_NB[:, 0]


def quantize_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the first level alone, bit for bit as bitsandbytes does.

    Args:
        values: ``[n]``, a multiple of 64 elements.

    Returns:
        Codes ``[n / 2]`` uint8 and the blocks' absolute maxima ``[n / 64]`` float32.
    """
    if values.device.type != "cpu":
        with default_stream(values.device):
            codes, absmax = _ops.quantize_4bit(values.contiguous(), BLOCK, "nf4", torch.uint8)
        return codes.flatten(), absmax.float()
    codes = torch.empty(values.numel() // 2, dtype=torch.uint8)
    absmax = torch.empty(values.numel() // BLOCK)
    for start in range(0, values.numel(), _CPU_CHUNK):
        part = values[start : start + _CPU_CHUNK].view(-1, BLOCK)
        stop = start + part.numel()
        _quantize_chunk(part, codes[start // 2 : stop // 2], absmax[start // BLOCK : stop // BLOCK])
    return codes, absmax


def _quantize_chunk(values_MB: Tensor, codes: Tensor, absmax_M: Tensor) -> None:
    """Quantise M blocks on the CPU, 7 times as fast as bitsandbytes, which searches each number among the 15 bounds."""
    scaled_MB = values_MB.to(torch.float32, copy=True)
    torch.amax(scaled_MB.abs(), dim=1, out=absmax_M)
    scaled_MB.mul_(absmax_M.clamp_min(1e-38).reciprocal_()[:, None]).clamp_(-1, 1)
    code_MB, is_above_MB = torch.zeros_like(scaled_MB), torch.empty_like(scaled_MB)
    for bound in _code_bounds():
        code_MB += torch.gt(scaled_MB, bound, out=is_above_MB)
    pairs = code_MB.view(-1, 2)
    codes.copy_(pairs[:, 0].mul(16).add_(pairs[:, 1]))


@cache
def _code_bounds() -> list[float]:
    """Return the midpoints between neighbours among the 16 numbers of NF4, ascending."""
    values = nf4_code(torch.device("cpu"))
    return ((values[1:] + values[:-1]) / 2).tolist()


def dequantize_nf4(packed: NF4Tensors, dtype: torch.dtype) -> Tensor:
    """Decode superblocks.

    Returns:
        ``[N * 16384]`` in ``dtype`` (float32, float16 or bfloat16), padding included.
    """
    return dequantize_codes(packed.codes, dequantize_scales(packed), dtype)


def dequantize_scales(packed: NF4Tensors) -> Tensor:
    """Decode the second level alone: the blocks' absolute maxima, ``[N, 256]`` float32."""
    code = dynamic_code(packed.scales.device)
    centred = _ops.dequantize_blockwise(packed.scales, packed.super_scale, code, BLOCKS_PER_SUPERBLOCK, torch.float32)
    absmax: Tensor = centred.view(len(packed.super_offset), -1).add_(packed.super_offset[:, None])
    return absmax


def dequantize_codes(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode the first level alone: ``codes [N, 8192]`` and ``absmax [N, 256]`` to ``[N * 16384]`` in ``dtype``."""
    # The CPU kernel runs its threads over rows: one superblock a row.
    shape = (len(codes), SUPERBLOCK)
    values: Tensor = _ops.dequantize_4bit(codes.flatten(), absmax.flatten(), BLOCK, "nf4", shape, dtype)
    return values.flatten()
