"""Grouped products against one product an expert."""

import pytest
import torch
from torch import Tensor

from lightning_mixcn.model.experts.grouped import (
    decoding_product,
    factor_product,
    outer_product,
    stack_product,
)
from lightning_mixcn.model.nf4.storage import DenseWeight, NF4Weight, Weight

COUNTS = [0, 5, 0, 9, 0]


@pytest.fixture
def ends() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_frozen_matrices(quantization: str, transposed: bool, ends: Tensor) -> None:
    shape = (len(COUNTS), 24, 40)
    weight: Weight = NF4Weight(shape) if quantization == "nf4" else DenseWeight(shape, torch.bfloat16)
    weight.write(0, torch.randn(shape).flatten())
    rows = torch.randn(sum(COUNTS), 40 if transposed else 24).bfloat16()
    decode = weight.decoder(torch.bfloat16)
    matrices = [decode(expert).double() for expert in range(len(COUNTS))]
    parts = zip(rows.double().split(COUNTS), matrices, strict=True)
    expected = torch.cat([part @ (matrix.t() if transposed else matrix) for part, matrix in parts])
    # One rounding to bfloat16, at most half a unit in the last place.
    product = stack_product(rows, weight, ends, transposed)
    torch.testing.assert_close(product.double(), expected, rtol=2**-8, atol=1e-6)
    if quantization == "none":
        assert torch.equal(decoding_product(rows, weight, ends, transposed), product)


def test_factors(ends: Tensor) -> None:
    rows, factor = torch.randn(sum(COUNTS), 16), torch.randn(len(COUNTS), 16, 8)
    expected = torch.cat([part @ matrix for part, matrix in zip(rows.split(COUNTS), factor, strict=True)])
    torch.testing.assert_close(factor_product(rows, factor, ends), expected)
    transposed = factor.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(factor_product(rows, transposed, ends), expected)


def test_an_expert_without_rows_has_no_gradient(ends: Tensor) -> None:
    left, right = torch.randn(sum(COUNTS), 16), torch.randn(sum(COUNTS), 8)
    result = outer_product(left, right, ends)
    for expert, (one, other) in enumerate(zip(left.split(COUNTS), right.split(COUNTS), strict=True)):
        torch.testing.assert_close(result[expert], one.t() @ other)
        assert COUNTS[expert] or not result[expert].any()
