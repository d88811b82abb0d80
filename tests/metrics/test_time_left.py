"""Seconds left at steps of a run whose clock is given."""

import pytest

from lightning_mixcn.callbacks.clocks import TimeLeft


@pytest.mark.parametrize(
    ("step", "steps", "seconds"), [(13, 20, 14.0), (20, 20, 0.0), (10, 20, None), (13, -1, None), (21, 20, 0.0)]
)
def test_it_counts_the_steps_of_this_process(step: int, steps: int, seconds: float | None) -> None:
    ticks = iter([100.0, 106.0])
    assert TimeLeft(step=10, now=lambda: next(ticks)).seconds(step, steps) == seconds
