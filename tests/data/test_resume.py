"""Real Lightning runs: killed, resumed, on other numbers of ranks and workers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.text import Source

Arguments = Callable[..., dict[str, Any]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # A resumed run writes where the killed one did.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


class KilledError(Exception):
    """Stands for the end of the process."""


class Recorder(LightningModule):
    """Trains one number and writes down the rows it was given."""

    def __init__(self, kill_at: int | None = None, file: Path | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.rows: list[Tensor] = []
        self.evaluated = 0
        self.kill_at = kill_at
        self.file = file

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.kill_at:
            raise KilledError
        self.rows.append(batch["input_ids"])
        if self.file is not None:
            torch.save(self.rows, self.file.with_suffix(f".{self.global_rank}"))
        return self.weight**2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluated += int((batch["labels"] != -100).sum())

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> int:
        self.validation_step(batch, batch_idx)
        return self.evaluated

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    return Trainer(
        default_root_dir=folder, max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[checkpoints], **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Record the rows of 40 steps of two rows."""
    module = PretrainDataModule(**arguments())
    module.setup("fit")
    batches = iter(module.train_dataloader())
    return torch.cat([next(batches)["input_ids"] for _ in range(40)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_twice(
    workers: int, accumulate: int, arguments: Arguments, tmp_path: Path, uninterrupted: Tensor
) -> None:
    """Batches fetched ahead by workers and by Lightning are neither lost nor repeated."""
    first = Recorder(kill_at=5)
    with pytest.raises(KilledError):
        trainer(tmp_path, 9, accumulate_grad_batches=accumulate).fit(
            first, datamodule=PretrainDataModule(**arguments(num_workers=workers))
        )
    done = 3 * accumulate  # the checkpoint after 3 steps; batches of 2 rows
    second = Recorder(kill_at=8)
    with pytest.raises(KilledError):  # resumed with the rows of a batch changed, as by other ranks
        trainer(tmp_path, 9, accumulate_grad_batches=accumulate).fit(
            second,
            datamodule=PretrainDataModule(**arguments(num_workers=2 - workers, micro_batch_size=4)),
            ckpt_path=str(tmp_path / "step=3.ckpt"),
        )
    third = Recorder()
    trainer(tmp_path, 9, accumulate_grad_batches=accumulate).fit(
        third,
        datamodule=PretrainDataModule(**arguments(num_workers=workers)),
        ckpt_path=str(tmp_path / "step=6.ckpt"),
    )
    rows = [*first.rows[:done], *second.rows[: 3 * accumulate], *third.rows]
    assert sum(map(len, rows)) == (3 * 2 + 3 * 4 + 3 * 2) * accumulate
    assert torch.equal(torch.cat(rows), uninterrupted[: sum(map(len, rows))])


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_and_validation_lose_no_row(
    workers: int, arguments: Arguments, tmp_path: Path, uninterrupted: Tensor
) -> None:
    model = Recorder()
    module = PretrainDataModule(**arguments(num_workers=workers))
    trainer(tmp_path, 10, limit_train_batches=4, val_check_interval=2).fit(model, datamodule=module)
    assert torch.equal(torch.cat(model.rows), uninterrupted[:20])
    assert model.evaluated > 0
    assert module.state_dict()["rows"] == 20
    resumed = Recorder()
    trainer(tmp_path, 12, limit_train_batches=4).fit(
        resumed, datamodule=PretrainDataModule(**arguments()), ckpt_path=str(tmp_path / "step=9.ckpt")
    )
    assert torch.equal(torch.cat(resumed.rows), uninterrupted[18:24])


def test_a_checkpoint_is_plain_data(arguments: Arguments, tmp_path: Path) -> None:
    trainer(tmp_path, 3).fit(Recorder(), datamodule=PretrainDataModule(**arguments()))
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert checkpoint["PretrainDataModule"]["rows"] == 6


def test_resuming_with_other_data_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    trainer(tmp_path, 3).fit(Recorder(), datamodule=PretrainDataModule(**arguments()))
    with pytest.raises(ValueError, match=r"cannot be continued: `seed` was 0 and is 5"):
        trainer(tmp_path, 6).fit(
            Recorder(), datamodule=PretrainDataModule(**arguments(seed=5)), ckpt_path=str(tmp_path / "step=3.ckpt")
        )


def test_training_ends_with_the_sources(arguments: Arguments, tmp_path: Path, sources: list[Source]) -> None:
    ending = [replace(source, max_epochs=1) for source in sources]
    model = Recorder()
    module = PretrainDataModule(**arguments(sources=ending, micro_batch_size=8))
    trainer(tmp_path, 10_000).fit(model, datamodule=module)
    steps = len(model.rows)
    assert 0 < steps < 200
    text = torch.cat(model.rows)
    documents = int((text == 1).sum())  # BOS
    assert documents == sum(count for name, count in module.describe().items() if name in ENDED)
    last = Recorder()
    trainer(tmp_path, 10_000).fit(
        last,
        datamodule=PretrainDataModule(**arguments(sources=ending)),
        ckpt_path=str(sorted_checkpoints(tmp_path)[-1]),
    )
    assert len(last.rows) < 3 * 4


ENDED = ("train/zh/documents", "train/en/documents")


def sorted_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))


def test_validate_test_and_predict(arguments: Arguments, tmp_path: Path, sources: list[Source]) -> None:
    module = PretrainDataModule(**arguments(test_sources=sources[1:], predict_sources=sources, max_eval_rows=None))
    run = trainer(tmp_path, 1)
    scored = []
    for evaluate in (run.validate, run.test, run.predict):
        model = Recorder()
        evaluate(model, datamodule=module)
        scored.append(model.evaluated)
    sizes = module.describe()
    expected = [
        sum(sizes[f"{stage}/{name}/bytes"] + sizes[f"{stage}/{name}/documents"] for name in module.source_names(stage))
        for stage in ("val", "test", "predict")
    ]
    assert scored == expected


@pytest.mark.multiprocess
def test_two_ranks_then_one(arguments: Arguments, tmp_path: Path, uninterrupted: Tensor) -> None:
    file = tmp_path / "rows"
    options: dict[str, Any] = {"strategy": "ddp_spawn", "devices": 2}
    trainer(tmp_path, 6, **options).fit(Recorder(file=file), datamodule=PretrainDataModule(**arguments()))
    of_ranks = [torch.load(file.with_suffix(f".{rank}")) for rank in range(2)]
    rows = torch.cat([batch for step in zip(*of_ranks, strict=True) for batch in step])
    assert torch.equal(rows, uninterrupted[:24])
    model = Recorder()
    trainer(tmp_path, 6).fit(
        model, datamodule=PretrainDataModule(**arguments()), ckpt_path=str(tmp_path / "step=3.ckpt")
    )
    assert torch.equal(torch.cat(model.rows), uninterrupted[12:18])


@pytest.mark.multiprocess
def test_two_ranks_end_together(arguments: Arguments, tmp_path: Path, sources: list[Source]) -> None:
    """Streams end at different rows, and the ranks share streams: all must stop at the same step."""
    ending = [replace(source, max_epochs=1) for source in sources]
    module = PretrainDataModule(**arguments(sources=ending, num_streams=5))
    options: dict[str, Any] = {"strategy": "ddp_spawn", "devices": 2}
    trainer(tmp_path, 10_000, **options).fit(Recorder(file=tmp_path / "rows"), datamodule=module)
    of_ranks = [torch.load(tmp_path / f"rows.{rank}") for rank in range(2)]
    assert len(of_ranks[0]) == len(of_ranks[1])
    module.setup("fit")
    counts = module.describe()
    assert sum(int((batch == 1).sum()) for rank in of_ranks for batch in rank) == sum(counts[name] for name in ENDED)
