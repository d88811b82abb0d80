"""What Lightning's flags do to the stream of training rows: which rows a run trains on, against the contract."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn

from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.text import Source

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # Of a run without validation texts.
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero:UserWarning"),
]
Make = Callable[..., dict[str, Any]]


class Seen(LightningModule):
    """Trains one number; keeps the rows of each micro-batch, the steps before them, and of each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.rows: list[list[list[int]]] = []
        self.steps: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.rows.append(batch["input_ids"].tolist())
        self.steps.append(self.trainer.global_step)
        return self.weight**2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(len(self.rows))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, arguments: dict[str, Any], ckpt_path: str | None = None, **flags: Any) -> Seen:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": False, "logger": False,
        "enable_model_summary": False, "enable_progress_bar": False, "max_epochs": -1, "num_sanity_val_steps": 0,
        "use_distributed_sampler": False, "max_steps": 6,
    }  # fmt: skip
    module = Seen()
    Trainer(**(settings | flags)).fit(module, PretrainDataModule(**arguments), ckpt_path=ckpt_path)
    assert not active_children()
    return module


@pytest.fixture(scope="module")
def contract(arguments: Make) -> list[list[list[int]]]:
    """Make the first 30 micro-batches of the run."""
    data = PretrainDataModule(**arguments())
    data.setup("fit")
    return [batch["input_ids"].tolist() for batch in islice(data.train_dataloader(), 30)]


class OtherSteps(Callback):
    """Sets the steps of the run, as ByteBudget does."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.fit_loop.epoch_loop.max_steps = 4


def test_weights_by_progress_take_the_rows_of_the_steps(arguments: Make, sources: list[Source], tmp_path: Path) -> None:
    """Six steps of two micro-batches of two rows; a callback that changes the steps needs them given."""
    by_progress = [replace(sources[0], weight={0.0: 0.1, 1.0: 0.9}), sources[1]]
    planned = arguments(sources=by_progress)
    given = PretrainDataModule(**planned, progress_rows=24)
    given.setup("fit")
    expected = [batch["input_ids"].tolist() for batch in islice(given.train_dataloader(), 12)]
    assert fit(tmp_path, planned, accumulate_grad_batches=2).rows == expected
    with pytest.raises(
        ValueError, match=r"`trainer.max_steps` was 12 rows and a callback, .* has made it 8: fractions"
    ):
        fit(tmp_path, planned, callbacks=[OtherSteps()])
    assert fit(tmp_path, planned | {"progress_rows": 24}, callbacks=[OtherSteps()]).rows == expected[:4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_overfit_batches_repeats_the_first_ones(
    count: int, workers: int, arguments: Make, contract: Any, tmp_path: Path
) -> None:
    seen = fit(tmp_path, arguments(num_workers=workers), overfit_batches=count)
    assert seen.rows == (contract[:count] * 6)[:6]
    assert seen.validated == list(range(count, 7, count))  # at the end of each epoch, which is `count` batches


def test_overfit_batches_with_accumulation(arguments: Make, contract: Any, tmp_path: Path) -> None:
    seen = fit(tmp_path, arguments(), overfit_batches=4, accumulate_grad_batches=2)
    assert seen.rows == contract[:4] * 3
    assert seen.steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_overfit_batches_goes_on_between_its_batches(arguments: Make, contract: Any, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    flags: dict[str, Any] = {"overfit_batches": 4, "callbacks": [saving], "enable_checkpointing": True}
    first = fit(tmp_path, arguments(), max_steps=6, **flags)
    again = fit(tmp_path, arguments(), str(tmp_path / "last.ckpt"), max_steps=12, **flags)
    assert first.rows + again.rows == contract[:4] * 3


def test_a_run_after_overfitting_begins_at_its_first_row(arguments: Make, contract: Any, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(tmp_path, arguments(), overfit_batches=4, max_steps=6, callbacks=[saving], enable_checkpointing=True)
    data = PretrainDataModule(**arguments())
    data.setup("fit")
    data.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["PretrainDataModule"])
    assert next(iter(data.train_dataloader()))["input_ids"].tolist() == contract[0]


def test_overfit_batches_of_sources_that_end(sources: list[Source], arguments: Make, tmp_path: Path) -> None:
    """One document, of which a stream each makes a row, and then no more."""
    (tmp_path / "one.txt").write_text("a text")
    short = [Source("one", str(tmp_path / "one.txt"), max_epochs=1)]
    changes = {"sources": short, "num_streams": 1, "micro_batch_size": 1, "val_fraction": 0.0}
    seen = fit(tmp_path, arguments(**changes), overfit_batches=9)
    assert len(seen.rows) == 6
    assert seen.rows == seen.rows[:1] * 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "flags",
    [
        {"limit_train_batches": 4},
        {"limit_train_batches": 4, "reload_dataloaders_every_n_epochs": 1},
        {"limit_train_batches": 5, "reload_dataloaders_every_n_epochs": 2},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"val_check_interval": 2, "limit_train_batches": 4},
    ],
    ids=str,
)
def test_epochs_of_some_batches_go_on_in_the_stream(
    flags: dict[str, Any], workers: int, arguments: Make, contract: Any, tmp_path: Path
) -> None:
    seen = fit(tmp_path, arguments(num_workers=workers), max_steps=15, **flags)
    assert seen.rows == contract[:15]


def test_validation_comes_when_it_is_asked_for(arguments: Make, tmp_path: Path) -> None:
    every: dict[str, Any] = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    assert fit(tmp_path, arguments(), max_steps=10, **every).validated == [3, 6, 9]
    assert fit(tmp_path, arguments(), max_steps=10, limit_train_batches=4).validated == [4, 8]
    assert fit(tmp_path, arguments(), max_steps=8, val_check_interval=2, limit_train_batches=4).validated == [
        2,
        4,
        6,
        8,
    ]


@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run(batches: int, arguments: Make, contract: Any, tmp_path: Path) -> None:
    seen = fit(tmp_path, arguments(num_workers=1), fast_dev_run=batches)
    assert seen.rows == contract[: int(batches)]
    assert seen.validated == [int(batches)]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("overfit_batches", 0.5), ("overfit_batches", 1.0), ("limit_train_batches", 0.1), ("val_check_interval", 0.25)],
)
def test_a_share_of_what_has_no_end_is_refused(flag: str, value: float, arguments: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`trainer.{flag}={value}`: the stream of training rows has no end"):
        fit(tmp_path, arguments(), None, **{flag: value})


def test_accumulation_by_epochs_is_refused(arguments: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scheduling=\{0: 1, 4: 2\}.*it counts epochs"):
        fit(tmp_path, arguments(), callbacks=[GradientAccumulationScheduler({0: 1, 4: 2})])
    same = fit(tmp_path, arguments(), callbacks=[GradientAccumulationScheduler({0: 2})], max_steps=2)
    assert same.steps == [0, 0, 1, 1]
