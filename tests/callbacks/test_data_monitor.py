"""What the monitor counts in real runs, against a count of the batches that the module was given."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from lightning_mixcn.callbacks import DataMonitor
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Trainer]
SOURCES = ["zh", "en"]
# 24 positions a row; rows 0 and 2 are Chinese, row 1 is English.
LENGTHS = [[24, 5, 3], [7, 24, 9], [1, 2, 24], [20, 20, 20], [24, 24, 24], [11, 6, 2]]
BATCHES = [random_batch(lengths, seed=seed, sources=2) for seed, lengths in enumerate(LENGTHS)]


class Lines(Logger):
    """Keeps what is logged."""

    name = "lines"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, {name: value for name, value in metrics.items() if name.startswith("data/")}))


class OneNumber(LightningModule):
    """Trains one number."""

    def __init__(self, work: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.work = work

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.work()
        return self.weight**2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.work()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens(batches: list[int]) -> dict[str, float]:
    """Tokens of each source in batches of ``LENGTHS``."""
    lengths = [LENGTHS[batch] for batch in batches]
    return {"data/zh/tokens": sum(a + c for a, _, c in lengths), "data/en/tokens": sum(b for _, b, _ in lengths)}


def padding(batches: list[int]) -> float:
    return 1 - sum(sum(LENGTHS[batch]) for batch in batches) / (len(batches) * 3 * 24)


def without_seconds(lines: list[tuple[int | None, dict[str, float]]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if "wait" not in name} for _, line in lines]


def test_tokens_and_padding(trainer: Make) -> None:
    lines, monitor = Lines(), DataMonitor()
    run = trainer(logger=lines, max_steps=3, log_every_n_steps=1, accumulate_grad_batches=2, callbacks=[monitor])
    run.fit(OneNumber(), FixedBatches(BATCHES, SOURCES))
    assert [step for step, _ in lines.lines] == [0, 1, 2]
    assert without_seconds(lines.lines) == [
        pytest.approx(tokens([*range(seen)]) | {"data/padding_share": padding([seen - 2, seen - 1])})
        for seen in (2, 4, 6)
    ]
    assert monitor.state_dict() == {"tokens": {name: tokens([*range(6)])[f"data/{name}/tokens"] for name in SOURCES}}


def test_it_logs_as_often_as_the_trainer(trainer: Make) -> None:
    lines = Lines()
    run = trainer(logger=lines, max_steps=5, log_every_n_steps=2, callbacks=[DataMonitor()])
    run.fit(OneNumber(), FixedBatches(BATCHES, SOURCES))
    assert [(step, line["data/zh/tokens"]) for step, line in lines.lines] == [
        (step, tokens([*range(step + 1)])["data/zh/tokens"]) for step in (1, 3)
    ]


# The batches of this test are no resumable stream: the resumed run begins with the first one again.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning")
def test_a_resumed_run_goes_on_counting(trainer: Make, tmp_path: Path) -> None:
    """The checkpoint of step 3 is in the middle of a window."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first = trainer(max_steps=3, log_every_n_steps=2, callbacks=[DataMonitor(), save], enable_checkpointing=True)
    first.fit(OneNumber(), FixedBatches(BATCHES, SOURCES))
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"]["DataMonitor"]["tokens"]
    assert saved == {name: tokens([0, 1, 2])[f"data/{name}/tokens"] for name in SOURCES}
    assert {type(count) for count in saved.values()} == {int}

    lines = Lines()
    second = trainer(max_steps=6, log_every_n_steps=2, callbacks=[DataMonitor()], logger=lines)
    second.fit(OneNumber(), FixedBatches(BATCHES, SOURCES), ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert without_seconds(lines.lines) == [
        pytest.approx(tokens([0, 1, 2, 0]) | {"data/padding_share": padding([0])}),
        pytest.approx(tokens([0, 1, 2, 0, 1, 2]) | {"data/padding_share": padding([1, 2])}),
    ]


def test_counts_above_float32_are_exact(trainer: Make) -> None:
    lines, monitor = Lines(), DataMonitor()
    monitor.load_state_dict({"tokens": {"zh": 2**40 + 1, "gone": 5}})
    run = trainer(logger=lines, max_steps=1, log_every_n_steps=1, callbacks=[monitor])
    run.fit(OneNumber(), FixedBatches(BATCHES, SOURCES))
    assert lines.lines[0][1]["data/zh/tokens"] == 2**40 + 1 + 27
    assert monitor.state_dict()["tokens"] == {"zh": 2**40 + 28, "gone": 5, "en": 5}


class Telling(FixedBatches):
    """Knows more of itself."""

    def epochs(self) -> dict[str, float]:
        return {"zh": 0.25, "en": 1.5}

    def bad_records(self) -> int:
        return 3


def test_what_the_data_module_tells(trainer: Make) -> None:
    lines = Lines()
    run = trainer(logger=lines, max_steps=1, log_every_n_steps=1, callbacks=[DataMonitor()])
    run.fit(OneNumber(), Telling(BATCHES, SOURCES))
    expected = {"data/zh/epoch": 0.25, "data/en/epoch": 1.5, "data/bad_records": 3.0}
    assert expected.items() <= lines.lines[0][1].items()


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "endless"])
def test_waiting_is_what_the_loader_takes(sized: bool, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the work of a step nor validation is waiting; a loader without length is fetched from ahead."""
    clock = Clock()
    monkeypatch.setattr("lightning_mixcn.callbacks.clocks.perf_counter", clock)

    class Slow:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in BATCHES:
                clock.advance(2.0)
                yield batch

    class Sized(Slow):
        def __len__(self) -> int:
            return len(BATCHES)

    lines, module = Lines(), OneNumber(work=lambda: clock.advance(6.0))
    settings = {"logger": lines, "max_steps": 4, "log_every_n_steps": 2, "callbacks": [DataMonitor()]}
    run: Any = trainer(**settings, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=1)
    profiler = run.profiler
    run.fit(module, Sized() if sized else Slow(), FixedBatches(BATCHES).val_dataloader())
    waiting = {"data/seconds_waiting": 4.0, "data/wait_share": 0.25}
    # Without a data module there are no sources.
    assert [line for _, line in lines.lines] == [waiting, waiting]
    assert run.profiler is profiler


def test_the_profiler_is_given_back_after_an_error(trainer: Make) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    run: Any = trainer(callbacks=[DataMonitor()])
    profiler = run.profiler
    with pytest.raises(RuntimeError, match="no"):
        run.fit(OneNumber(work=fail), FixedBatches(BATCHES, SOURCES))
    assert run.profiler is profiler


# Rank r takes batches r, r + 2, …
PROGRAM = """
import os, sys
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from lightning_mixcn.callbacks import DataMonitor, StepCheckpoint
from lightning_mixcn.testing import FixedBatches, random_batch

out, lengths, rank = sys.argv[1], eval(sys.argv[2]), int(os.environ["LOCAL_RANK"])
# Lightning uses the group that is there, which meets through a file instead of a port.
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)

class Shared(FixedBatches):
    def train_dataloader(self):
        return DataLoader(self.batches[rank::2], batch_size=None)

class OneNumber(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
    def training_step(self, batch, batch_idx):
        return self.weight ** 2
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=3, log_every_n_steps=2, use_distributed_sampler=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, logger=False, limit_val_batches=0,
    callbacks=[DataMonitor(), StepCheckpoint(every_n_steps=1, keep=3, dirpath=out)],
)
trainer.fit(OneNumber(), Shared([random_batch(rows, sources=2) for rows in lengths], ["zh", "en"]))
if rank == 0:
    torch.save({name: float(value) for name, value in trainer.callback_metrics.items()}, f"{out}/metrics.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_two_ranks_are_added_up(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), repr(LENGTHS)],
            env=os.environ | {"LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    metrics = torch.load(tmp_path / "metrics.pt", weights_only=True)
    expected = tokens([0, 1, 2, 3]) | {"data/padding_share": padding([0, 1, 2, 3])}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"step={step:08d}.ckpt", weights_only=True)["callbacks"]["DataMonitor"]["tokens"]
        assert saved == {name: tokens([*range(2 * step)])[f"data/{name}/tokens"] for name in SOURCES}


class Weighted(FixedBatches):
    """Says what its weights ask for."""

    num_streams, sequence_length = 3, 24

    def __init__(self, asked: dict[str, float], ended: list[str] | None = None) -> None:
        super().__init__(BATCHES, SOURCES)
        self.asked, self.ended = asked, ended or []

    def token_shares(self, last_rows: int | None = None) -> dict[str, float]:
        return self.asked

    def ended_sources(self) -> list[str]:
        return self.ended


@pytest.fixture
def six_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill a window of two batches, two rows of each stream."""
    monkeypatch.setattr("lightning_mixcn.callbacks.data_monitor._LEAST_ROWS", 6)


@pytest.mark.usefixtures("six_rows")
def test_shares_are_logged_beside_those_asked_for(trainer: Make) -> None:
    """Over the last 6 rows, which are two batches."""
    lines = Lines()
    run = trainer(logger=lines, max_steps=2, log_every_n_steps=1, callbacks=[DataMonitor()])
    run.fit(OneNumber(), Weighted({"zh": 0.6, "en": 0.4}))
    for step, (_, line) in enumerate(lines.lines):
        seen = tokens([*range(max(0, step - 1), step + 1)])
        expected = seen["data/zh/tokens"] / sum(seen.values())
        assert line["data/zh/token_share"] == pytest.approx(expected)
        assert line["data/zh/token_share"] + line["data/en/token_share"] == pytest.approx(1)
        assert (line["data/zh/token_share_asked"], line["data/en/token_share_asked"]) == (0.6, 0.4)


@pytest.mark.usefixtures("six_rows")
def test_a_mixture_that_does_not_hold_is_warned_of_once(trainer: Make) -> None:
    """The shares of Chinese in two batches in a row are 0.597, 0.612, 0.747, 0.667 and 0.670."""
    message = r"do not hold the weights of `sources`, in tokens: zh 74\.7% \(asked for 63\.0%\), en 25\.3%"
    run = trainer(max_steps=6, log_every_n_steps=1, callbacks=[DataMonitor()])
    with pytest.warns(UserWarning, match=message) as warnings:
        run.fit(OneNumber(), Weighted({"zh": 0.63, "en": 0.37}))
    assert len([warning for warning in warnings if "do not hold" in str(warning.message)]) == 1


@pytest.mark.usefixtures("six_rows")
def test_a_mixture_within_five_points_is_not_warned_of(trainer: Make) -> None:
    """The first batch alone is off by more: it is not two rows of each stream."""
    run = trainer(max_steps=2, log_every_n_steps=1, callbacks=[DataMonitor()])
    run.fit(OneNumber(), Weighted({"zh": 0.64, "en": 0.36}))


def test_few_rows_are_not_warned_of(trainer: Make) -> None:
    run = trainer(max_steps=6, log_every_n_steps=1, callbacks=[DataMonitor()])
    run.fit(OneNumber(), Weighted({"zh": 0.1, "en": 0.9}))


@pytest.mark.usefixtures("six_rows")
@pytest.mark.parametrize(("ended", "settings"), [(["en"], {}), ([], {"overfit_batches": 2})])
def test_other_shares_on_purpose_are_not_warned_of(ended: list[str], settings: dict[str, Any], trainer: Make) -> None:
    run = trainer(max_steps=6, log_every_n_steps=1, callbacks=[DataMonitor()], **settings)
    run.fit(OneNumber(), Weighted({"zh": 0.1, "en": 0.9}, ended))
