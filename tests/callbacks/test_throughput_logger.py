"""Figures of runs whose clock is given, and what a TensorBoard event file has of them."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mixcn.callbacks import DataMonitor, ThroughputLogger
from lightning_mixcn.cli import main
from lightning_mixcn.metrics.device import PeakRate
from lightning_mixcn.model.memory.flops import count_training_flops
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Trainer]
LENGTHS = [[24, 5, 3], [7, 24, 9], [1, 2, 24], [20, 20, 20], [24, 24, 24], [11, 6, 2], [24, 1, 1], [9, 9, 9]]
BATCHES = [random_batch(lengths, seed=seed) for seed, lengths in enumerate(LENGTHS)]


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("lightning_mixcn.callbacks.clocks.perf_counter", clock)
    peak = PeakRate(1e9, False)
    monkeypatch.setattr("lightning_mixcn.callbacks.throughput_logger.peak_rate", lambda device, dtype: peak)
    return clock


def spend(clock: Clock, seconds: dict[str, float]) -> type[PretrainModule]:
    """Make a module whose phases take the given seconds of each micro-batch, or of each update."""

    class Slow(PretrainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            clock.now += seconds["forward"]
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:  # after the callbacks' hook, so it is a part of the update
            clock.now += seconds["after"]

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            clock.now += seconds["backward"]
            super().backward(loss, *args, **kwargs)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            clock.now += seconds["optimizer"]
            super().on_before_optimizer_step(optimizer)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            clock.now += seconds["other"]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 1000.0
            super().validation_step(batch, batch_idx)

    return Slow


class SlowData(FixedBatches):
    """Takes three seconds a batch."""

    clock: Clock

    def train_dataloader(self) -> Any:
        clock, batches = self.clock, self.batches

        class Loader:
            def __iter__(self) -> Iterator[Any]:
                for batch in batches:
                    clock.now += 3.0
                    yield batch

            def __len__(self) -> int:
                return len(batches)

        return Loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches[:1], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset, too


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag.removeprefix("throughput/"): [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("throughput/") and tag != "throughput/tokens_per_second"
    }


def test_where_the_time_goes(clock: Clock, trainer: Make, module: PretrainModule, tmp_path: Path) -> None:
    """Two micro-batches a step, two steps a log, validation after the third step."""
    seconds = {"forward": 0.5, "backward": 0.25, "after": 0.0, "optimizer": 2.0, "other": 0.125}
    slow = spend(clock, seconds)(module.base, dtype="float32", lora=module.lora)
    data = SlowData(BATCHES)
    data.clock = clock
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    settings: dict[str, Any] = {
        "max_steps": 4,
        "log_every_n_steps": 1,
        "accumulate_grad_batches": 2,
        "val_check_interval": 6,
    }
    callbacks = [ThroughputLogger(every_n_steps=2), DataMonitor()]
    run = trainer(logger=logger, limit_val_batches=1, callbacks=callbacks, **settings)
    profiler = run.profiler  # type: ignore[attr-defined]  # Lightning sets it outside of the class
    run.fit(slow, data)
    assert run.profiler is profiler  # type: ignore[attr-defined]
    logged = scalars(tmp_path)
    assert {step for points in logged.values() for step, _ in points} == {1, 3}
    second = {tag: points[1][1] for tag, points in logged.items()}
    parts = {"data": 6.0, "forward": 1.0, "backward": 0.5, "optimizer": 2.0, "other": 0.25}
    assert {name: second[f"seconds_{name}"] for name in parts} == pytest.approx(parts)
    assert second["seconds_per_step"] == pytest.approx(9.75)
    tokens = sum(map(sum, LENGTHS[4:]))
    assert second["tokens_per_second_per_device"] == pytest.approx(tokens / 19.5)
    flops = count_training_flops(slow.model, "selective")  # type: ignore[arg-type]  # it is there by now
    work = flops.of(tokens, sum(n * (n + 1) // 2 for lengths in LENGTHS[4:] for n in lengths))
    assert second["teraflops_per_second_per_device"] == pytest.approx(work.useful / 19.5e12)
    assert second["fraction_of_peak"] == pytest.approx(work.useful / 19.5e9)
    assert second["fraction_of_peak_with_recompute"] == pytest.approx(work.total / 19.5e9)
    assert second["recompute_share"] == pytest.approx(work.recompute / work.total)
    assert second["peak_teraflops_per_second"] == pytest.approx(0.001)
    assert 0.1 < second["host_resident_gib"] < 100
    left = [value for _, value in logged["seconds_left"]]
    # Half of the run is over; the batches of the first log were fetched ahead, its two steps had 3 + 6.
    assert left == [pytest.approx(logged["seconds_per_step"][0][1] * 2), 0.0]


def test_a_run_with_a_real_clock(trainer: Make, module: PretrainModule, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    run = trainer(logger=logger, max_steps=4, log_every_n_steps=1, callbacks=[ThroughputLogger(every_n_steps=3)])
    run.fit(module, FixedBatches(BATCHES))
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["fraction_of_peak"]] == [2]
    assert 0 < logged["fraction_of_peak"][0][1] < logged["fraction_of_peak_with_recompute"][0][1] < 1


def test_the_profiler_is_given_back_whatever_the_order(trainer: Make, module: PretrainModule) -> None:
    for callbacks in ([ThroughputLogger(), DataMonitor()], [DataMonitor(), ThroughputLogger()]):
        run: Any = trainer(max_steps=1, callbacks=callbacks)
        profiler = run.profiler
        run.fit(module, FixedBatches(BATCHES))
        assert run.profiler is profiler


def test_wrong_arguments_and_hosts(trainer: Make) -> None:
    class Other(LightningModule):
        pass

    with pytest.raises(ValueError, match=r"`every_n_steps=0`: expected at least 1; see ThroughputLogger"):
        ThroughputLogger(every_n_steps=0)
    with pytest.raises(ValueError, match=r"ThroughputLogger works with a CausalLMModule, but `model` is Other"):
        ThroughputLogger().setup(trainer(), Other(), "fit")


@pytest.mark.gpu
def test_on_a_gpu(trainer: Make, module: PretrainModule, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    settings: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "log_every_n_steps": 1}
    run = trainer(logger=logger, max_steps=4, callbacks=[ThroughputLogger(2)], **settings)
    run.fit(module, FixedBatches(BATCHES))
    last = {tag: points[-1][1] for tag, points in scalars(tmp_path).items()}
    assert 0 < last["allocated_gib"] <= last["peak_allocated_gib"] <= last["reserved_gib"] * 1.001
    assert min(last[f"seconds_{name}"] for name in ("forward", "backward", "optimizer")) > 0
    assert 0 < last["fraction_of_peak"] < 1


def test_in_a_run_of_the_command_line(
    fit_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its short name, which replaces the one that is there by default; so are the check and the summary."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    callbacks = [
        {"class_path": "ThroughputLogger", "init_args": {"every_n_steps": 2}},
        {"class_path": "TrainabilityCheck"},
        {"class_path": "FitSummary"},
    ]
    overlay = tmp_path / "more.yaml"
    overlay.write_text(json.dumps({"trainer": {"max_steps": 4, "logger": True, "callbacks": callbacks}}))
    assert main(["fit", "--config", str(fit_config), "--config", str(overlay)]) == 0
    logged = scalars(tmp_path / "runs" / "fit" / "tensorboard")
    assert [step for step, _ in logged["fraction_of_peak"]] == [1, 3]
    assert "tokens per second  " in caplog.text


@pytest.mark.parametrize("name", ["ThroughputLogger", "TrainabilityCheck", "FitSummary"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--trainer.callbacks.help={name}"])
    text = capsys.readouterr().out
    assert ("every_n_steps" in text) == (name == "ThroughputLogger")
