"""How long the bar says a run is."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_mixcn.callbacks import StepProgressBar


@pytest.mark.parametrize(
    ("max_steps", "batches", "expected"), [(10, float("inf"), 40), (10, 12, 12), (-1, 12, 12), (10, 50, 40)]
)
def test_it_counts_micro_batches(max_steps: int, batches: float, expected: float) -> None:
    bar, run = StepProgressBar(), SimpleNamespace()
    run.max_steps, run.num_training_batches, run.accumulate_grad_batches = max_steps, batches, 4
    trainer: Any = run
    bar._trainer = trainer
    assert bar.total_train_batches == expected
