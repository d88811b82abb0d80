import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mixcn.callbacks.compared_run import FACTS_FILE, RunFacts
from lightning_mixcn.commands.process import peak_resident_bytes

ROWS = {
    "document_ids": torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]]),
    "input_ids": torch.tensor([[1, 2, 3, 0], [4, 4, 4, 4]]),
}


class Host(nn.Module):
    """Stands for the LightningModule: some parameters, and the last validation's likelihoods."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(10), requires_grad=False)
        self.trained = nn.Parameter(torch.zeros(3))
        self.source_likelihoods: dict[str, Any] = {}


class Pieces:
    """Stands for the tokenizer: piece 3 is a letter of three bytes, the others of one."""

    def num_bytes(self, ids: list[int]) -> int:
        return sum(3 if piece == 3 else 1 for piece in ids)


class TwoRanks:
    """Stands for the strategy: another rank that has counted the same."""

    def reduce(self, here: Tensor, reduce_op: str) -> Tensor:
        return {"sum": 2 * here, "max": here + 1_000_000}[reduce_op]


def stand_in(tmp_path: Path, tokenizer: Any = None) -> Any:
    return SimpleNamespace(
        default_root_dir=str(tmp_path),
        global_step=0,
        max_steps=5,
        sanity_checking=False,
        is_global_zero=True,
        strategy=TwoRanks(),
        datamodule=SimpleNamespace(tokenizer=tokenizer),
    )


def train(facts: RunFacts, trainer: Any, host: Any, steps: int) -> None:
    facts.on_fit_start(trainer, host)
    for step in range(steps):
        facts.on_train_batch_start(trainer, host, ROWS, step)
        facts.on_train_batch_end(trainer, host, None, ROWS, step)
        trainer.global_step += 1


def written(tmp_path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tmp_path / FACTS_FILE).read_text(encoding="utf-8"))
    return facts


def test_facts_of_a_run(tmp_path: Path) -> None:
    trainer, host, callback = stand_in(tmp_path, Pieces()), Host(), RunFacts()
    train(callback, trainer, host, 2)
    host.source_likelihoods["val"] = {"zh": {"bits_per_byte": 2.5, "tokens": 7}}
    callback.on_validation_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    callback.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    facts = written(tmp_path)
    assert (facts["steps"], facts["planned_steps"]) == (2, 5)
    peak = peak_resident_bytes()
    assert 0 < facts["peak_memory_bytes"] - 1_000_000 <= peak
    assert facts["training_seconds"] <= facts["fit_seconds"]
    assert facts["tokens_seen"] == 2 * 2 * 7
    assert facts["text_bytes_seen"] == 2 * 2 * (1 + 1 + 3 + 4)  # padding is no text
    assert facts["parameters"] == {"total": 13, "trainable": 3, "quantised": 0}
    assert facts["bytes_in_memory"] == {"quantised": 0, "trainable": 12, "dense": 40}
    likelihoods = {"zh": {"bits_per_byte": 2.5, "tokens": 7}}
    assert facts["validations"] == [{"step": 2, "text_bytes_seen": 36, "sources": likelihoods}]
    assert facts["tokens_per_second"] == pytest.approx(28 / facts["training_seconds"])
    assert [path.name for path in tmp_path.iterdir()] == [FACTS_FILE]


def test_without_a_tokenizer_bytes_are_unknown(tmp_path: Path) -> None:
    trainer, host, callback = stand_in(tmp_path), Host(), RunFacts()
    train(callback, trainer, host, 1)
    callback.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    assert written(tmp_path)["text_bytes_seen"] is None


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    trainer, host, first, second = stand_in(tmp_path, Pieces()), Host(), RunFacts(), RunFacts()
    train(first, trainer, host, 1)
    first.on_validation_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    train(second, trainer, host, 1)
    second.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    facts = written(tmp_path)
    assert facts["tokens_seen"] == 28
    assert facts["fit_seconds"] > first.state_dict()["fit_seconds"]
    assert [validation["step"] for validation in facts["validations"]] == [1]


def test_a_sanity_check_is_not_kept(tmp_path: Path) -> None:
    trainer, host, callback = stand_in(tmp_path), Host(), RunFacts()
    trainer.sanity_checking = True
    callback.on_validation_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    callback.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    assert written(tmp_path)["validations"] == []


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    trainer = stand_in(tmp_path)
    trainer.is_global_zero = False
    RunFacts().on_fit_end(trainer, Host())  # type: ignore[arg-type]  # a stand-in
    assert not (tmp_path / FACTS_FILE).exists()
