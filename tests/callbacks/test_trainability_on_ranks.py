"""`TrainabilityCheck` where gradients and frozen parameters are sharded or replicated."""

import csv
from pathlib import Path

import pytest

from lightning_mixcn.testing import run_distributed
from tests.callbacks import trainability_run

pytestmark = pytest.mark.multiprocess


def test_two_ranks(tiny_base: Path, tmp_path: Path) -> None:
    """All ranks end alike, also where one alone sees what is wrong."""
    cases = [(name, what) for name in ("fsdp2", "ddp") for what in ("good", "detached", "changed")]
    of_ranks = run_distributed(trainability_run.fit, 2, cases, str(tiny_base), str(tmp_path))
    assert of_ranks[0] == of_ranks[1]
    for (name, what), error in zip(cases, of_ranks[0], strict=True):
        if what == "good":
            assert error == "", name
        if what == "detached":
            assert "no gradient for model.layers.1.block_sparse_moe.experts.2.w3.lora_B, which should" in error
        if what == "changed":
            assert f"model.{trainability_run.CODES} changed up to optimizer step 1, though frozen" in error
    # Four micro-batches of 53 tokens on each rank in the first two steps.
    with next((tmp_path / "fsdp2" / "good").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/tokens_per_second_per_device"]]
    rate, seconds = (
        float(rows[0][f"throughput/{name}"]) for name in ("tokens_per_second_per_device", "seconds_per_step")
    )
    assert rate * seconds * 2 == pytest.approx(4 * 53)
