"""Strategies over NCCL, on one GPU and on several, against one process; gloo's, on CPUs, are in test_strategies.py."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mixcn.testing import run_distributed
from tests.modules import strategy_run

pytestmark = pytest.mark.multiprocess

# (backend, ranks): gloo shows on a CPU that the bodies of these tests are right.
ONE_RANK = [pytest.param("gloo", marks=pytest.mark.slow), pytest.param("nccl", marks=pytest.mark.gpu)]
TWO_RANKS = [pytest.param("gloo", marks=pytest.mark.slow), pytest.param("nccl", marks=pytest.mark.multigpu)]


def train(backend: Any, ranks: int, name: str, base: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    """Return each rank's results."""
    run = partial(strategy_run.train, **changes)
    found = run_distributed(run, ranks, [name], str(base), str(out / f"{name} {ranks}"), backend=backend)
    return [of_rank[name] for of_rank in found]


def compare(rank: dict[str, Any], one: dict[str, Any]) -> None:
    """Compare up to float32, whose sums have no fixed order on a GPU, over a few steps of AdamW."""
    assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert rank["base"] == one["base"]
    assert rank["adapter"].keys() == one["adapter"].keys()
    for key, expected in one["adapter"].items():
        assert torch.linalg.norm(rank["adapter"][key] - expected) <= 1e-2 * torch.linalg.norm(expected), key


@pytest.mark.parametrize("backend", ONE_RANK)
def test_fsdp2_with_one_rank(backend: str, tiny_base: Path, tmp_path: Path) -> None:
    (one,), (alone,) = (train(backend, 1, name, tiny_base, tmp_path, max_steps=4) for name in ("one", "fsdp2"))
    compare(alone, one)


@pytest.mark.parametrize("backend", TWO_RANKS)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "hsdp", "plain"])
def test_ranks_train_as_one_does(name: str, backend: str, tiny_base: Path, tmp_path: Path) -> None:
    (one,) = train(backend, 1, "one", tiny_base, tmp_path, max_steps=4)
    for rank in train(backend, 2, name, tiny_base, tmp_path, max_steps=4):
        compare(rank, one)


@pytest.mark.parametrize("backend", TWO_RANKS)
def test_resuming_on_another_number_of_ranks(backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Saved on 2 ranks, resumed on 1: the losses, and so the rows, of the uninterrupted run."""
    lines = [json.dumps({"text": f"{number} " * (number % 17)}) for number in range(900)]
    text, folder, losses = tmp_path / "text.jsonl", str(tmp_path / "checkpoints"), list[float]()
    text.write_text("\n".join(lines), encoding="utf-8")
    (whole,) = train(backend, 1, "one", tiny_base, tmp_path, max_steps=4, path=str(text))
    for ranks, until, newest in ((2, 2, None), (1, 4, f"{folder}/step=00000002.ckpt")):
        changes = {"max_steps": until, "ckpt_path": newest, "checkpoints": folder, "path": str(text)}
        losses += train(backend, ranks, "fsdp2", tiny_base, tmp_path, **changes)[0]["losses"]
    assert losses == pytest.approx(whole["losses"], rel=1e-4)
