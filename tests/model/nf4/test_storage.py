"""Stacks of matrices: what is written piece by piece is read back matrix by matrix."""

import pytest
import torch

from lightning_mixcn.model.nf4 import codec as nf4
from lightning_mixcn.model.nf4.storage import DenseWeight, NF4Weight

# An expert of 64x256 is one superblock exactly; one of 64x172 begins in the middle of a superblock.
SHAPES = [(3, 64, 256), (4, 172, 64), (1, 7, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_are_slices_of_the_flat_weight(shape: tuple[int, int, int]) -> None:
    values = torch.randn(shape)
    weight = NF4Weight(shape)
    weight.write(0, values.flatten())
    flat = weight.flat(torch.float32).view(shape)
    for index in range(shape[0]):
        assert torch.equal(weight.decoder(torch.float32)(index), flat[index])
    assert (flat - values).norm() / values.norm() < 0.15


def test_writing_in_pieces_equals_writing_at_once() -> None:
    values = torch.randn(4 * 172 * 64)
    whole, pieces = NF4Weight((4, 172, 64)), NF4Weight((4, 172, 64))
    whole.write(0, values)
    for start in range(0, values.numel(), nf4.SUPERBLOCK):
        pieces.write(start, values[start : start + nf4.SUPERBLOCK])
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dense_weight_keeps_its_values() -> None:
    values, weight = torch.randn(2, 5, 3), DenseWeight((2, 5, 3), torch.float32)
    weight.write(0, values.flatten()[:10])
    weight.write(10, values.flatten()[10:])
    assert torch.equal(weight.decoder(torch.float32)(1), values[1])
    assert torch.equal(weight.flat(torch.float64), values.flatten().double())


def test_everything_is_frozen_and_meta_works() -> None:
    weight = NF4Weight((8, 14336, 4096), device="meta")
    assert not any(parameter.requires_grad for parameter in weight.parameters())
    assert weight.codes.shape == (8 * 3584, 8192)
