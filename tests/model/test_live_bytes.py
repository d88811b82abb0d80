"""Counted bytes against a count by hand and torch's own sizes of storages."""

import torch

from lightning_mixcn.model.memory.optimizer import LiveBytes


def test_views_are_free_and_what_is_gone_is_not_counted() -> None:
    before = torch.ones(10)
    with LiveBytes() as live:
        made = torch.empty(8, 8)
        view = made[2:].t()
        del made
        assert live.now == 256  # the view still holds all of it
        before.mul_(2)
        assert live.now == 256
        total = (view + 1).sum()
    assert live.peak == 256 + 192 + 4
    del view, total
    assert live.now == 0


def test_backward_counts_too() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        loss = (weight.exp() * 2).sum()
        assert live.now == 404  # what exp keeps, and the loss
        loss.backward()
        del loss
    assert live.now == 400
    assert weight.grad is not None
