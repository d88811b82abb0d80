"""Dropout masks."""

import torch

from lightning_mixcn.model.experts.operands import Dropout


def test_masks_depend_on_the_seed_only() -> None:
    like = torch.zeros(1)
    one, again, other = (Dropout(0.5, seed).mask((64, 8), 0, like) for seed in (1, 1, 2))
    assert one is not None
    assert again is not None
    assert other is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert set(one.unique().tolist()) == {0.0, 2.0}
