"""Rows times 4-bit matrices in one kernel against decoding each matrix with bitsandbytes and multiplying in float64."""

import pytest
import torch
from torch import Tensor

from lightning_mixcn.model.nf4.storage import NF4Weight

# The interpreter multiplies bfloat16 as integers; a GPU is asked for it, too.
DTYPES = [(torch.float32, 1e-6), (torch.float16, 1e-3)] + [(torch.bfloat16, 8e-3)] * torch.cuda.is_available()
# Rows of each expert (uneven, none at either end or inside, more than a tile), and `out` and `in`: multiples of a tile
# or not, rows that begin inside a block of 64, matrices that begin inside a superblock.
CASES = [
    ([3, 0, 17], 64, 128), ([0, 5, 0], 40, 192), ([70, 1, 2], 130, 70), ([1, 1, 1], 33, 50), ([0, 0, 2], 100, 256),
    ([20], 128, 64),
]  # fmt: skip


def expected(rows: Tensor, weight: NF4Weight, counts: list[int], transposed: bool) -> Tensor:
    decode = weight.decoder(torch.float32)
    # The kernel rounds the decoded weight to the rows' dtype, as bitsandbytes does.
    matrices = [decode(index).to(rows.dtype).double() for index in range(len(counts))]
    parts = rows.double().split(counts)
    return torch.cat([part @ (w.t() if transposed else w) for part, w in zip(parts, matrices, strict=True)])


@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "gradient"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("counts", "width_out", "width_in"), CASES)
def test_equals_decoding_first(
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
    truth = expected(rows, weight, counts, transposed)
    assert result.dtype == dtype
    assert (result.double() - truth).norm() <= tolerance * truth.norm()
