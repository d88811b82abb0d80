"""Seeds of micro-batches."""

from itertools import product
from pathlib import Path

import pytest
import torch

from lightning_mixcn.modules.step import micro_batch_seed, seed_micro_batch
from lightning_mixcn.testing import run_distributed
from tests.modules import dropout_run


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
