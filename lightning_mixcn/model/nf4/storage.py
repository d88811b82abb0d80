"""Storage of frozen weights: a stack of matrices in 4 bits, or dense.

Both classes are plain ``nn.Module``s with plain frozen parameters, so state_dict, safetensors, FSDP and DCP see nothing
special, and both answer the same calls: ``decoder`` to use, ``held`` and ``write`` to fill, ``flat`` to read back.
Under FSDP2 a rank fills its shard with ``write``; ``decoder`` and ``flat`` need the gathered whole.
"""

from collections.abc import Callable
from math import prod
from typing import Self

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from lightning_mixcn.model.sharding import local_shard, shard_elements, write_to_shard

from . import codec as nf4


class NF4Weight(nn.Module):
    """A stack of ``[G, out, in]`` matrices in NF4 with double quantisation, flattened and cut into superblocks.

    Args:
        shape: ``(G, out, in)``: G matrices (the experts of a layer, or 1).
        device: Device of the (uninitialised) tensors; ``meta`` works.
    """

    codes: Tensor
    scales: Tensor
    super_scale: Tensor
    super_offset: Tensor
    gemv: "GemvStack | GemmStack | None" = None  # see `generation.prepare_for_generation`

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.shape = shape
        count = nf4.superblocks(prod(shape))
        layout = {
            "codes": ((count, nf4.SUPERBLOCK // 2), torch.uint8),
            "scales": ((count, nf4.BLOCKS_PER_SUPERBLOCK), torch.uint8),
            "super_scale": ((count,), torch.float32),
            "super_offset": ((count,), torch.float32),
        }
        for name, (size, dtype) in layout.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
            )

    def train(self, mode: bool = True) -> Self:
        """Free what `prepare_for_generation` made when training begins."""
        if mode:
            self.gemv = None
        return super().train(mode)

    def decoder(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Return a function that decodes matrix ``index`` to ``[out, in]`` in ``dtype``.

        It holds the blocks' scales of all matrices, decoded once: 1/32 of the bytes of the matrices in 16 bits.
        """
        codes, (_, rows, columns) = self.codes.detach(), self.shape
        absmax = nf4.dequantize_scales(self.packed())

        def matrix(index: int) -> Tensor:
            start = index * rows * columns
            first, offset = divmod(start, nf4.SUPERBLOCK)
            last = -(-(start + rows * columns) // nf4.SUPERBLOCK)
            values = nf4.dequantize_codes(codes[first:last], absmax[first:last], dtype)
            return values[offset : offset + rows * columns].view(rows, columns)

        return matrix

    def held(self) -> range:
        """Return the elements of the stack that this rank holds, whole superblocks."""
        codes, first = local_shard(self.codes)
        stop = min((first + len(codes)) * nf4.SUPERBLOCK, prod(self.shape))
        return range(min(first * nf4.SUPERBLOCK, stop), stop)

    def write(self, start: int, values: Tensor) -> None:
        """Quantise ``values`` (flat) into the superblocks from element ``start``, a multiple of 16,384, on."""
        assert start % nf4.SUPERBLOCK == 0, f"write starts inside a superblock: {start}"
        packed = nf4.quantize_nf4(values.to(self.codes.device))
        for target, source in zip((self.codes, self.scales, self.super_scale, self.super_offset), packed, strict=True):
            rows, held_from = local_shard(target)
            first = start // nf4.SUPERBLOCK - held_from
            rows[first : first + len(source)].copy_(source)

    def flat(self, dtype: torch.dtype) -> Tensor:
        """Return all elements, ``[G * out * in]`` in ``dtype``."""
        return nf4.dequantize_nf4(self.packed(), dtype)[: prod(self.shape)]

    def packed(self) -> nf4.NF4Tensors:
        """Return the four tensors, without autograd."""
        return nf4.NF4Tensors(
            *(tensor.detach() for tensor in (self.codes, self.scales, self.super_scale, self.super_offset))
        )


class DenseWeight(nn.Module):
    """The same stack of matrices, not quantised.

    Args:
        shape: ``(G, out, in)``.
        dtype: Floating point type of the parameter ``values``.
        device: Device of the (uninitialised) tensor; ``meta`` works.
    """

    gemv: None = None

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.values = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

    def decoder(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Return a function that gives matrix ``index`` as ``[out, in]`` in ``dtype``."""
        values = self.values.detach()
        return lambda index: values[index].to(dtype)

    def held(self) -> range:
        """Return the elements of the stack that this rank holds."""
        return shard_elements(self.values)

    def write(self, start: int, values: Tensor) -> None:
        """Copy ``values`` (flat) in from element ``start`` on."""
        write_to_shard(self.values, start, values)

    def flat(self, dtype: torch.dtype) -> Tensor:
        """Return all elements, ``[G * out * in]`` in ``dtype``."""
        return self.values.detach().flatten().to(dtype)


Weight = NF4Weight | DenseWeight


# Rows up to which the kernel is faster than decoding first: 0.86 against 1.30 ms for 3584 x 1024 on two cores.
GEMV_ROWS = 32
# The kernel takes 32 outputs together, two halves of 16: one in the low four bits of its bytes, one in the high four.
_TOGETHER = 32


class GemvStack:
    """A copy of a stack of 4-bit matrices ``[G, out, in]`` in the order of bitsandbytes' CPU kernel for a few rows.

    The kernel decodes inside the product. A step of generation has a row or a few for each matrix, and decoding the
    matrix first takes four times as long as multiplying with it.
    The scales are bfloat16, not float32: a product is off by 0.26 % instead of 0.24 % (root mean square) from the one
    with the decoded weights in float32.

    Args:
        weight: On the CPU, with ``out`` a multiple of 32 and ``in`` one of 64.
    """

    def __init__(self, weight: NF4Weight) -> None:
        groups, rows, columns = weight.shape
        # The kernel's order: [.., 32 outputs, in] to [.., in / 2, 16 outputs, 2].
        low, high = weight.codes.detach().flatten()[: prod(weight.shape) // 2].view(-1, 2, 16, columns // 2).unbind(1)
        even, odd = (low >> 4) | (high & 0xF0), (low & 0xF) | (high << 4)
        self._codes = torch.stack((even, odd), -1).transpose(1, 2).reshape(groups, rows, columns // 2)
        blocks = columns // nf4.BLOCK
        scales = nf4.dequantize_scales(weight.packed()).flatten()[: groups * rows * blocks]
        self._scales = scales.view(groups, rows, blocks).mT.to(torch.bfloat16).contiguous()
        self._source, self._version, self._shape = weight.codes, weight.codes._version, (rows, columns)
        self._code = nf4.nf4_code(torch.device("cpu"))

    def serves(self, rows: Tensor) -> bool:
        """Tell if it may replace the weight: few rows, no gradient is wanted, and the weight has not changed."""
        few = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and rows[..., 0].numel() <= GEMV_ROWS
        return few and not torch.is_grad_enabled() and self._source._version == self._version

    def product(self, rows_nI: Tensor, group: int = 0) -> Tensor:
        """Multiply ``[.., in]`` bfloat16 with the transposed matrix ``group`` to ``[.., out]``."""
        y: Tensor = torch.ops.bitsandbytes.gemv_4bit(
            rows_nI.contiguous(), self._codes[group], self._shape, self._scales[group], self._code, nf4.BLOCK
        )
        return y

    @staticmethod
    def can_hold(weight: NF4Weight) -> bool:
        """Tell if there is a kernel for this weight on this machine."""
        if type(weight.codes.data) is not Tensor or weight.codes.device.type != "cpu":
            return False
        _, rows, columns = weight.shape
        fits = rows % _TOGETHER == 0 and columns % nf4.BLOCK == 0
        return fits and bool(bnb.has_avx512bf16())  # type: ignore[no-untyped-call]  # bitsandbytes is untyped

    @staticmethod
    def planned_bytes(weight: NF4Weight) -> int:
        """Return the bytes of the copy: half a byte a weight, and two bytes for each block's scale."""
        return prod(weight.shape) // 2 + 2 * prod(weight.shape) // nf4.BLOCK


class GemmStack:
    """A stack of 4-bit matrices ``[G, out, in]`` on a GPU, as bitsandbytes' kernel for a few rows reads it.

    The kernel decodes inside the product, and takes the codes as they are. Blocks' scales are decoded here, once:
    a step of generation uses two of eight experts, and would decode the scales of all.

    Args:
        weight: With ``in`` a multiple of 64, so that a row of a matrix is whole blocks.
    """

    def __init__(self, weight: NF4Weight) -> None:
        groups, rows, columns = weight.shape
        self._codes = weight.codes.detach().flatten()[: prod(weight.shape) // 2].view(groups, -1)
        scales = nf4.dequantize_scales(weight.packed()).flatten()
        self._scales = scales[: prod(weight.shape) // nf4.BLOCK].view(groups, -1)
        self._source, self._version, self._shape = weight.codes, weight.codes._version, (rows, columns)

    def serves(self, rows: Tensor) -> bool:
        """Tell if it may replace the weight: few rows, no gradient is wanted, and the weight has not changed."""
        few = rows.device == self._source.device and rows[..., 0].numel() <= GEMV_ROWS
        return few and not torch.is_grad_enabled() and self._source._version == self._version

    def product(self, rows_nI: Tensor, group: int = 0) -> Tensor:
        """Multiply ``[.., in]`` with the transposed matrix ``group`` to ``[.., out]``, in the dtype of the rows."""
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            rows_nI, self._codes[group], self._shape, self._scales[group], nf4.BLOCK, "nf4"
        )
        return y

    @staticmethod
    def can_hold(weight: NF4Weight) -> bool:
        """Tell if there is a kernel for this weight on its device."""
        return type(weight.codes.data) is Tensor and weight.codes.is_cuda and weight.shape[2] % nf4.BLOCK == 0

    @staticmethod
    def planned_bytes(weight: NF4Weight) -> int:
        """Return the bytes of the scales, float32."""
        return 4 * weight.scales.numel()


def few_rows_kernel(weight: NF4Weight) -> type[GemvStack] | type[GemmStack] | None:
    """Return what multiplies a few rows with this weight fastest, or ``None``: decoding it first."""
    return next((kernel for kernel in (GemvStack, GemmStack) if kernel.can_hold(weight)), None)
