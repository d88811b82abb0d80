import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mixcn.demo.facts import FACTS_FILE, RunFacts


class Host(nn.Module):
    """Stands for the LightningModule: some parameters, and the last validation's likelihoods."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(10), requires_grad=False)
        self.trained = nn.Parameter(torch.zeros(3))
        self.source_likelihoods: dict[str, Any] = {}


def run(tmp_path: Path, is_global_zero: bool = True) -> Path:
    trainer: Any = SimpleNamespace(
        default_root_dir=str(tmp_path), global_step=0, sanity_checking=True, is_global_zero=is_global_zero
    )
    host: Any = Host()
    facts = RunFacts()
    facts.on_validation_end(trainer, host)  # sanity checking: not kept
    trainer.sanity_checking = False
    batch = {"document_ids": torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]])}
    for step in range(2):
        facts.on_train_batch_start(trainer, host, batch, step)
        facts.on_train_batch_end(trainer, host, None, batch, step)
    trainer.global_step = 2
    host.source_likelihoods["val"] = {"zh": {"bits_per_byte": 2.5, "tokens": 7}}
    facts.on_validation_end(trainer, host)
    facts.on_fit_end(trainer, host)
    return tmp_path / FACTS_FILE


def test_facts_of_a_run(tmp_path: Path) -> None:
    facts = json.loads(run(tmp_path).read_text(encoding="utf-8"))
    assert facts["tokens_seen"] == 14
    assert facts["parameters"] == {"total": 13, "trainable": 3, "quantised": 0}
    assert facts["bytes_in_memory"] == {"quantised": 0, "trainable": 12, "dense": 40}
    assert facts["validations"] == [{"step": 2, "sources": {"zh": {"bits_per_byte": 2.5, "tokens": 7}}}]
    assert facts["tokens_per_second"] == pytest.approx(14 / facts["training_seconds"])
    assert [path.name for path in tmp_path.iterdir()] == [FACTS_FILE]


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    assert not run(tmp_path, is_global_zero=False).exists()
