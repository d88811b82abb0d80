"""Triton's kernels against bitsandbytes, bit for bit, and against products and autograd of torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.model.nf4 import codec as nf4
from lightning_mixcn.model.nf4.storage import NF4Weight

HAS_GPU = torch.cuda.is_available()
# In bfloat16 the interpreter cuts off instead of rounding, and multiplies as integers; a GPU is asked for it, too.
DECODED = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_GPU
PRODUCTS = [(torch.float32, 1e-6), (torch.float16, 1e-3)] + [(torch.bfloat16, 8e-3)] * HAS_GPU
# Half a unit in the last place.
SWIGLU = [(torch.float32, 1e-6), (torch.float16, 5e-4)] + [(torch.bfloat16, 4e-3)] * HAS_GPU


@pytest.mark.parametrize("dtype", DECODED)
@pytest.mark.parametrize("numel", [5, 16384, 2 * 16384 + 100])
def test_decoding_equals_bitsandbytes(numel: int, dtype: torch.dtype, device: str) -> None:
    from lightning_mixcn.model.kernels.nf4_decode import nf4_decode

    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 0.02
    packed = nf4.quantize_nf4(values.to(device))
    assert torch.equal(nf4_decode(packed, dtype), nf4.dequantize_nf4(packed, dtype))


# Rows of each expert (uneven, none at either end or inside, more than a tile), and `out` and `in`: multiples of a tile
# or not, rows that begin inside a block of 64, matrices that begin inside a superblock.
CASES = [
    ([3, 0, 17], 64, 128), ([0, 5, 0], 40, 192), ([70, 1, 2], 130, 70), ([1, 1, 1], 33, 50), ([0, 0, 2], 100, 256),
    ([20], 128, 64),
]  # fmt: skip


def decoded_product(rows: Tensor, weight: NF4Weight, counts: list[int], transposed: bool) -> Tensor:
    decode = weight.decoder(torch.float32)
    # The kernel rounds the decoded weight to the rows' dtype, as bitsandbytes does.
    matrices = [decode(index).to(rows.dtype).double() for index in range(len(counts))]
    parts = rows.double().split(counts)
    return torch.cat([part @ (w.t() if transposed else w) for part, w in zip(parts, matrices, strict=True)])


@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "gradient"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRODUCTS)
@pytest.mark.parametrize(("counts", "width_out", "width_in"), CASES)
def test_a_product_equals_decoding_first(
    counts: list[int],
    width_out: int,
    width_in: int,
    dtype: torch.dtype,
    tolerance: float,
    transposed: bool,
    device: str,
) -> None:
    from lightning_mixcn.model.kernels.nf4_product import nf4_product

    torch.manual_seed(width_out)
    shape = (len(counts), width_out, width_in)
    weight = NF4Weight(shape, device)
    weight.write(0, torch.randn(shape).flatten() * 0.1)
    rows = torch.randn(sum(counts), width_in if transposed else width_out).to(device, dtype)
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    result = nf4_product(rows, weight.packed(), shape, ends, transposed)
    truth = decoded_product(rows, weight, counts, transposed)
    assert result.dtype == dtype
    assert (result.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), SWIGLU)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (7, 48), (3, 2500)])
def test_swiglu_equals_autograd(rows: int, width: int, dtype: torch.dtype, tolerance: float, device: str) -> None:
    from lightning_mixcn.model.kernels.swiglu import swiglu_backward_kernel, swiglu_kernel

    torch.manual_seed(width)
    gate, up, dh = (torch.randn(rows, width).to(device, dtype) * 3 for _ in range(3))
    weight = torch.rand(rows, device=device)
    exact_gate, exact_up, exact_weight = (tensor.double().requires_grad_() for tensor in (gate, up, weight))
    exact = F.silu(exact_gate) * exact_up
    # The row's routing weight scales what comes after h, so its gradient is <dh, h>.
    (exact * exact_weight[:, None]).backward(dh.double())
    h, dgate, dup, dweight = swiglu_backward_kernel(gate, up, dh.clone(), weight)
    assert torch.equal(h, swiglu_kernel(gate, up))
    assert dweight.dtype == torch.float32
    for value, truth in ((h, exact), (dgate, exact_gate.grad), (dup, exact_up.grad), (dweight, exact_weight.grad)):
        assert truth is not None
        assert (value.double() - truth).norm() <= tolerance * truth.norm()
