"""Gradients of uneven micro-batches against those of one large batch, in plain torch."""

import hashlib
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn.callbacks import StepCheckpoint
from lightning_mixcn.model.experts.loop import Dropout
from lightning_mixcn.modules import FSDP2Strategy, PretrainModule
from lightning_mixcn.modules.step import (
    REFERENCE_COUNT,
    Contribution,
    GradientWindow,
    micro_batch_seed,
    rescale_gradients,
    seed_micro_batch,
)
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed


def contribution(minimised: float, count: float) -> Contribution:
    value, number = torch.tensor(minimised), torch.tensor(count)
    return Contribution(value, number, value, value, number, number, value, number)


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
    totals = window.close(TwoRanks(torch.full((8,), 10.0, dtype=torch.float64)))
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


def masks(
    base: str, out: str, strategy: str, mode: str, max_steps: int, ckpt_path: str | None = None
) -> list[tuple[set[str], set[str]]]:
    """Train on the same rows again and again, two micro-batches a step.

    Returns:
        For each micro-batch digests of the masks that its forward pass drew, and of those that recomputation drew.
    """
    found: list[tuple[set[str], set[str]]] = []
    dropout, mask_of_experts = torch.nn.functional.dropout, Dropout.mask

    def note(mask: Tensor) -> None:
        again = torch._C._current_graph_task_id() != -1
        found[-1][again].add(hashlib.sha256(mask.detach().float().numpy().tobytes()).hexdigest())

    def noted(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        mask = dropout(torch.ones_like(x), p)
        note(mask)
        return x * mask

    def noted_of_experts(self: Dropout, shape: torch.Size, stream: int, like: Tensor) -> Tensor | None:
        mask = mask_of_experts(self, shape, stream, like)
        if mask is not None and stream == 0:  # one a layer; the others are of as many rows as an expert has
            note(mask)
        return mask

    class Noting(PretrainModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            found.append((set(), set()))

    torch.nn.functional.dropout, Dropout.mask = noted, noted_of_experts  # type: ignore[assignment,method-assign]
    try:
        lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "o_proj", "gate", "w1", "w2"])
        module = Noting(base, dtype="float32", lora=lora, activation_checkpointing=mode)  # type: ignore[arg-type]
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        trainer = Trainer(
            accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy,
            max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=2, use_distributed_sampler=False, logger=False,
            callbacks=[StepCheckpoint(every_n_steps=1, keep=9, dirpath=f"{out}/checkpoints")], default_root_dir=out,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, FixedBatches([random_batch([24, 17])] * 100), ckpt_path=ckpt_path)
    finally:
        torch.nn.functional.dropout, Dropout.mask = dropout, mask_of_experts  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_masks_differ_between_micro_batches_and_are_the_same_when_computed_again(
    mode: str, tiny_base: Path, tmp_path: Path
) -> None:
    """The rows are the same; two layers draw a mask each for q, o, the router, and the experts' input."""
    found = masks(str(tiny_base), str(tmp_path), "auto", mode, 2)
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
    ranks = run_distributed(masks, 2, base, whole, strategy, "selective", 4)
    drawn = [forward for found in ranks for forward, _ in found]
    assert sum(map(len, drawn)) == len(set().union(*drawn)) == 2 * 8 * 8
    run_distributed(masks, 2, base, cut, strategy, "selective", 2)
    checkpoint = str(next(Path(cut, "checkpoints").glob("step=*2.ckpt")))
    resumed = run_distributed(masks, 2, base, cut, strategy, "full", 4, checkpoint)
    assert [[forward for forward, _ in found] for found in resumed] == [
        [forward for forward, _ in found[4:]] for found in ranks
    ]
