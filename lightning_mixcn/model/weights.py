"""Storage of frozen weights: a stack of matrices in 4 bits, or dense.

Both classes are plain ``nn.Module``s with plain frozen parameters, so state_dict, safetensors, FSDP and DCP see nothing
special, and both answer the same calls: ``decoder`` to use, ``held`` and ``write`` to fill, ``flat`` to read back.
Under FSDP2 a rank fills its share with ``write``; ``decoder`` and ``flat`` need the gathered whole.
"""

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import nf4
from .local_rows import held_elements, local_rows, write_elements

if TYPE_CHECKING:  # it imports this module
    from .few_rows import FewRows


class NF4Weight(nn.Module):
    """A stack of ``[G, out, in]`` matrices in NF4 with double quantisation, flattened and cut into superblocks.

    Args:
        shape: ``(G, out, in)``: G matrices (the experts of a layer, or 1).
        device: Where the (uninitialised) tensors are made; ``meta`` works.
    """

    codes: Tensor
    scales: Tensor
    super_scale: Tensor
    super_offset: Tensor
    few_rows: "FewRows | None" = None  # see `generation.prepare_for_generation`

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

    def decoder(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """What decodes matrix ``index`` to ``[out, in]`` in ``dtype``, anew at each call.

        It holds the blocks' scales of all matrices, decoded once: 1/32 of the bytes of the matrices in 16 bits.
        """
        codes, (_, rows, columns) = self.codes.detach(), self.shape
        absmax = nf4.dequantize_scales(self.packed())

        def matrix(index: int) -> Tensor:
            start = index * rows * columns
            first, last = start // nf4.SUPERBLOCK, nf4.superblocks(start + rows * columns)
            offset = start - first * nf4.SUPERBLOCK
            values = nf4.dequantize_codes(codes[first:last], absmax[first:last], dtype)
            return values[offset : offset + rows * columns].view(rows, columns)

        return matrix

    def held(self) -> range:
        """Elements of the stack that this rank holds, whole superblocks."""
        codes, first = local_rows(self.codes)
        stop = min((first + len(codes)) * nf4.SUPERBLOCK, prod(self.shape))
        return range(min(first * nf4.SUPERBLOCK, stop), stop)

    def write(self, start: int, values: Tensor) -> None:
        """Quantise ``values`` (flat) into the superblocks from element ``start``, a multiple of 16,384, on."""
        assert start % nf4.SUPERBLOCK == 0, f"write starts inside a superblock: {start}"
        packed = nf4.quantize(values.to(self.codes.device))
        for target, source in zip((self.codes, self.scales, self.super_scale, self.super_offset), packed, strict=True):
            rows, held_from = local_rows(target)
            first = start // nf4.SUPERBLOCK - held_from
            rows[first : first + len(source)].copy_(source)

    def flat(self, dtype: torch.dtype) -> Tensor:
        """All elements, ``[G * out * in]`` in ``dtype``."""
        return nf4.dequantize(self.packed(), dtype)[: prod(self.shape)]

    def packed(self) -> nf4.NF4Tensors:
        """The four tensors, without autograd."""
        return nf4.NF4Tensors(
            *(tensor.detach() for tensor in (self.codes, self.scales, self.super_scale, self.super_offset))
        )


class DenseWeight(nn.Module):
    """The same stack of matrices, not quantised.

    Args:
        shape: ``(G, out, in)``.
        dtype: Floating point type of the parameter ``values``.
        device: Where the (uninitialised) tensor is made; ``meta`` works.
    """

    few_rows: None = None

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.values = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

    def decoder(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """What gives matrix ``index`` as ``[out, in]`` in ``dtype``."""
        values = self.values.detach()
        return lambda index: values[index].to(dtype)

    def held(self) -> range:
        """Elements of the stack that this rank holds."""
        return held_elements(self.values)

    def write(self, start: int, values: Tensor) -> None:
        """Copy ``values`` (flat) in from element ``start`` on."""
        write_elements(self.values, start, values)

    def flat(self, dtype: torch.dtype) -> Tensor:
        """All elements, ``[G * out * in]`` in ``dtype``."""
        return self.values.detach().flatten().to(dtype)


Weight = NF4Weight | DenseWeight
