"""Gradients of uneven micro-batches against those of one large batch, in plain torch."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_mixcn.modules.step import (
    REFERENCE_COUNT,
    Contribution,
    GradientWindow,
    micro_batch_seed,
    rescale_gradients,
    seed_micro_batch,
)
from lightning_mixcn.testing import run_distributed
from tests.modules import dropout_run


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
        (loss_sum(weight, piece) * (2 / REFERENCE_COUNT) / 2 / 2).backward()
    norm = rescale_gradients([weight, torch.nn.Parameter(torch.ones(1))], 25, world_size=2)

    expected = torch.ones(8, dtype=torch.float64, requires_grad=True)
    (loss_sum(expected, torch.cat(pieces)) / 25).backward()
    assert weight.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-14, atol=0)
    assert float(norm) == pytest.approx(float(expected.grad.norm()))


def test_every_place_has_its_own() -> None:
    places = list(product(range(5), range(50), range(5)))
    assert len({micro_batch_seed(*place) for place in places}) == len(places)


def test_the_same_place_draws_the_same() -> None:
    seed_micro_batch(0, 3, 1)
    first = torch.rand(4)
    torch.rand(7)
    seed_micro_batch(0, 3, 1)
    assert torch.equal(torch.rand(4), first)


def test_the_random_numbers_of_gpus_are_set_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    seed_micro_batch(0, 3, 1)
    assert seeds == [micro_batch_seed(0, 3, 1)]


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_masks_differ_between_micro_batches_and_are_the_same_when_computed_again(
    mode: str, tiny_base: Path, tmp_path: Path
) -> None:
    """The rows are the same; two layers draw a mask each for q, o, the router, and the experts' input."""
    found = dropout_run.masks(str(tiny_base), str(tmp_path), "auto", mode, 2)
    drawn = [forward for forward, _ in found]
    assert [len(masks) for masks in drawn] == [8] * 4
    assert len(set().union(*drawn)) == 32
    for forward, again in found:
        # The experts' backward draws their masks from a seed; recomputation draws all of the layer or of attention.
        assert again <= forward
        assert len(again) == {"none": 2, "selective": 6, "full": 8, "offload": 8}[mode]


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_masks_differ_between_ranks_and_a_resumed_run_draws_the_same(
    strategy: str, tiny_base: Path, tmp_path: Path
) -> None:
    base, whole, cut = str(tiny_base), str(tmp_path / "whole"), str(tmp_path / "cut")
    ranks = run_distributed(dropout_run.masks, 2, base, whole, strategy, "selective", 4)
    drawn = [forward for found in ranks for forward, _ in found]
    assert sum(map(len, drawn)) == len(set().union(*drawn)) == 2 * 8 * 8
    run_distributed(dropout_run.masks, 2, base, cut, strategy, "selective", 2)
    checkpoint = str(next(Path(cut, "checkpoints").glob("step=*2.ckpt")))
    resumed = run_distributed(dropout_run.masks, 2, base, cut, strategy, "full", 4, checkpoint)
    assert [[forward for forward, _ in found] for found in resumed] == [
        [forward for forward, _ in found[4:]] for found in ranks
    ]
