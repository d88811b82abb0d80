"""A change anywhere is seen."""

import pytest
import torch

from lightning_mixcn.model.lora.trainability import fingerprints


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 13, 8192, 5 * 8192 + 3])
def test_one_bit(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randint(0, 200, (size,)).to(dtype)
    before = fingerprints([tensor, torch.ones(3)])
    for place in (0, size // 2, size - 1):
        bits = tensor.view(torch.uint8)
        position = place * tensor.element_size()
        bits[position] ^= 1
        assert (fingerprints([tensor, torch.ones(3)]) != before).tolist() == [True, False]
        bits[position] ^= 1
    assert torch.equal(fingerprints([tensor, torch.ones(3)]), before)


def test_exchanged_superblocks() -> None:
    codes = torch.arange(2, dtype=torch.uint8)[:, None].expand(2, 8192).clone()
    assert fingerprints([codes]) != fingerprints([codes.flip(0)])


def test_a_view_that_is_not_aligned() -> None:
    values = torch.arange(100, dtype=torch.uint8)[3:]
    before = fingerprints([values])
    values[50] += 1
    assert fingerprints([values]) != before


def test_no_tensors() -> None:
    assert fingerprints([]).shape == (0,)
