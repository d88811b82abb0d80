"""The clock of a run, on a clock of our own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler

from lightning_mixcn.callbacks import StepProgressBar
from lightning_mixcn.callbacks.clocks import PhaseClock, StepClock, step_clock

FETCH = "[_TrainingEpochLoop].train_dataloader_next"


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the clock say these numbers."""

    def say(*times: float) -> None:
        iterator = iter(times)
        monkeypatch.setattr("lightning_mixcn.callbacks.clocks.perf_counter", lambda: next(iterator))

    return say


def stand_in(profiler: Any = None) -> Any:
    return SimpleNamespace(
        callbacks=[], profiler=profiler or SimpleProfiler(), global_step=10, max_steps=20, lightning_module=None
    )


def test_only_training_batches_are_waited_for(ticks: Any) -> None:
    trainer = stand_in()
    clock = step_clock(trainer)
    ticks(10.0, 12.5, 20.0, 20.25)
    for action in (FETCH, "[_EvaluationLoop].val_next", "run_training_batch", FETCH):
        with trainer.profiler.profile(action):
            pass
    assert clock.waited_seconds == 2.75


def test_the_trainers_profiler_is_told_everything() -> None:
    inner = SimpleProfiler()
    trainer = stand_in(inner)
    clock = step_clock(trainer)
    assert step_clock(trainer) is clock
    assert trainer.callbacks == [clock]
    for action in (FETCH, "run_training_batch"):
        with trainer.profiler.profile(action):
            pass
    assert {name: len(durations) for name, durations in inner.recorded_durations.items()} == {
        FETCH: 1,
        "run_training_batch": 1,
    }
    assert "run_training_batch" in trainer.profiler.summary()
    clock.teardown(trainer, None, "fit")  # type: ignore[arg-type]  # a stand-in
    assert trainer.profiler is inner


def test_a_step_is_its_micro_batches_and_waiting(ticks: Any) -> None:
    """Neither validation nor what comes between two batches is in it; validation is not in the seconds of training."""
    logged: list[float] = []
    trainer, module, batch = stand_in(), SimpleNamespace(tokens_of_step=84.0), {"document_ids": torch.zeros(2, 3)}
    module.log = lambda name, value, prog_bar: logged.append(float(value))
    clock: Any = step_clock(trainer)
    ticks(0.0, 1.0, 2.0, 5.0, 6.0)
    clock.on_train_start(trainer, module)
    for step in (10, 11):
        with trainer.profiler.profile(FETCH):
            pass
        clock.on_train_batch_start(trainer, module, batch, 0)
        trainer.global_step = step
        clock.on_train_batch_end(trainer, module, None, batch, 0)
        if step == 10:
            assert (clock.training_seconds, logged) == (2.0, [])
            ticks(10.0, 20.0, 30.0, 31.0, 40.0, 44.0, 50.0, 60.0)
            clock.on_validation_start(trainer, module)
            clock.on_validation_end(trainer, module)
    assert clock.training_seconds == 2.0 + 5.0
    assert logged == [84.0 / 7.0]
    assert int(clock.tokens) == 12
    assert (clock.total_seconds, clock.seconds) == (50.0, 60.0 - 10.0)


def test_phases_are_added_up(ticks: Any) -> None:
    ticks(1.0, 3.0, 6.0, 10.0, 15.0, 21.0)
    clock = PhaseClock(torch.device("cpu"))
    assert clock.take() == {}
    for phase in ("forward", "backward", "forward", "other"):
        clock.mark(phase)
    assert clock.take() == {"forward": 2.0 + 4.0, "backward": 3.0}
    clock.mark("forward")
    assert clock.take() == {"other": 5.0}


@pytest.mark.gpu
def test_on_cuda_the_device_s_own_time_counts() -> None:
    device = torch.device("cuda")
    clock, a = PhaseClock(device), torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    clock.mark("forward")
    for _ in range(20):
        a = a @ a
    clock.mark("other")
    assert clock.take()["forward"] > 0.001


@pytest.mark.parametrize(
    ("step", "steps", "seconds"), [(13, 20, 14.0), (20, 20, 0.0), (10, 20, None), (13, -1, None), (21, 20, 0.0)]
)
def test_what_is_left_counts_the_steps_of_this_process(
    step: int, steps: int, seconds: float | None, ticks: Any
) -> None:
    trainer, clock = stand_in(), StepClock()
    ticks(100.0, 106.0)
    clock.on_train_start(trainer, None)  # type: ignore[arg-type]  # a stand-in
    trainer.global_step, trainer.max_steps = step, steps
    assert clock.seconds_left(trainer) == seconds


@pytest.mark.parametrize(
    ("max_steps", "batches", "expected"), [(10, float("inf"), 40), (10, 12, 12), (-1, 12, 12), (10, 50, 40)]
)
def test_the_bar_counts_micro_batches(max_steps: int, batches: float, expected: float) -> None:
    bar, run = StepProgressBar(), SimpleNamespace()
    run.max_steps, run.num_training_batches, run.accumulate_grad_batches = max_steps, batches, 4
    trainer: Any = run
    bar._trainer = trainer
    assert bar.total_train_batches == expected


def test_an_error_begins_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    bar, run = StepProgressBar(), SimpleNamespace(max_steps=8, num_training_batches=8, accumulate_grad_batches=1)
    trainer: Any = run
    module: Any = None
    bar._trainer = trainer
    bar.on_exception(trainer, module, ValueError())  # before there is a bar
    bar.train_progress_bar = bar.init_train_tqdm()
    bar.train_progress_bar.update()
    bar.on_exception(trainer, module, ValueError())
    out = capsys.readouterr().out
    assert "1/" in out
    assert out.endswith("\n")
