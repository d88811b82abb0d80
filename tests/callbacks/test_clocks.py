"""The clock of waiting, on a clock of our own."""

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler

from lightning_mixcn.callbacks.clocks import FetchClock, PhaseClock, TimeLeft

FETCH = "[_TrainingEpochLoop].train_dataloader_next"


def test_only_training_batches_are_waited_for() -> None:
    times = iter([10.0, 12.5, 20.0, 20.25])
    clock = FetchClock(SimpleProfiler(), now=lambda: next(times))
    for action in (FETCH, "[_EvaluationLoop].val_next", "run_training_batch", FETCH):
        with clock.profile(action):
            pass
    assert clock.take() == 2.75
    assert clock.take() == 0.0


def test_the_trainers_profiler_is_told_everything() -> None:
    inner = SimpleProfiler()
    clock = FetchClock(inner)
    for action in (FETCH, "run_training_batch"):
        with clock.profile(action):
            pass
    assert {name: len(durations) for name, durations in inner.recorded_durations.items()} == {
        FETCH: 1,
        "run_training_batch": 1,
    }
    assert "run_training_batch" in clock.summary()


def test_phases_are_added_up() -> None:
    ticks = iter([1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    clock = PhaseClock(torch.device("cpu"), now=lambda: next(ticks))
    assert clock.take() == {}
    for phase in ("forward", "backward", "forward", "other"):
        clock.mark(phase)
    assert clock.take() == {"forward": 2.0 + 4.0, "backward": 3.0}
    clock.mark("forward")
    assert clock.take() == {"other": 5.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
def test_it_counts_the_steps_of_this_process(step: int, steps: int, seconds: float | None) -> None:
    ticks = iter([100.0, 106.0])
    assert TimeLeft(step=10, now=lambda: next(ticks)).seconds(step, steps) == seconds
