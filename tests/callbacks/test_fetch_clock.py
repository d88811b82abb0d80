"""The clock of waiting, on a clock of our own."""

from lightning.pytorch.profilers import SimpleProfiler

from lightning_mixcn.callbacks.clocks import FetchClock

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
