"""Gradients of uneven micro-batches against those of one large batch, in plain torch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_mixcn.modules.step import (
    Contribution,
    GradientWindow,
    micro_batch_scale,
    rescale_gradients,
)


def contribution(minimised: float, count: float) -> Contribution:
    value, number = torch.tensor(minimised), torch.tensor(count)
    return Contribution(value, number, value, value, number, number)


class TwoRanks:
    """Adds what another rank has."""

    def __init__(self, other: torch.Tensor) -> None:
        self.other = other

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        return tensor.add_(self.other)


def test_sums_over_micro_batches_and_ranks() -> None:
    window = GradientWindow()
    window.add(contribution(3.0, 5))
    window.add(contribution(4.0, 2))
    totals = window.close(TwoRanks(torch.full((6,), 10.0, dtype=torch.float64)))
    assert (float(totals.minimised), float(totals.count)) == (17.0, 17.0)
    assert totals.count.dtype == torch.float64


def test_closing_opens_a_new_window() -> None:
    window, alone = GradientWindow(), SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    window.add(contribution(3.0, 5))
    window.close(alone)
    window.add(contribution(1.0, 2))
    assert float(window.close(alone).count) == 2


def test_an_empty_window_is_refused() -> None:
    strategy: Any = None
    with pytest.raises(ValueError, match=r"got no micro-batch.*override `compute_loss` instead"):
        GradientWindow().close(strategy)


def test_gradients_are_those_of_the_mean() -> None:
    """Two ranks with two micro-batches of uneven length each; Lightning divides by 2, DDP averages over ranks."""
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(length, 8, generator=generator, dtype=torch.float64) for length in (7, 1, 13, 4)]

    def loss_sum(weight: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        return (piece @ weight).square().sum()

    weight = torch.ones(8, dtype=torch.float64, requires_grad=True)
    for piece in pieces:
        (loss_sum(weight, piece) * micro_batch_scale(2) / 2 / 2).backward()
    norm = rescale_gradients([weight, torch.nn.Parameter(torch.ones(1))], 25, world_size=2)

    expected = torch.ones(8, dtype=torch.float64, requires_grad=True)
    (loss_sum(expected, torch.cat(pieces)) / 25).backward()
    assert weight.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-14, atol=0)
    assert float(norm) == pytest.approx(float(expected.grad.norm()))
