"""What Lightning's strategies and trainers become in a plan."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_mixcn.model.memory.plan import Sharing
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.modules.memory import micro_batch, sharing_of
from lightning_mixcn.modules.strategies import FSDP2Strategy
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    [
        ("auto", Sharing(copies=16, gradient_copies=1)),
        ("ddp", Sharing(copies=16, gradient_copies=1)),
        (DDPStrategy(gradient_as_bucket_view=True), Sharing(copies=16)),
        ("fsdp", Sharing("fsdp2", 16)),
        ("fsdp2", Sharing("fsdp2", 16)),
        ("hsdp", Sharing("fsdp2", 8, 2)),
        (FSDP2Strategy(shard_size=4, reshard_after_forward=False, prefetch=2), Sharing("fsdp2", 4, 4, False, 2)),
    ],
)
def test_strategies(strategy: Any, sharing: Sharing) -> None:
    assert sharing_of(strategy, ranks=16, ranks_of_node=8) == sharing


def test_one_rank_shares_nothing() -> None:
    assert sharing_of("auto", ranks=1, ranks_of_node=1) == Sharing()


def test_data_of_unknown_shape() -> None:
    with pytest.raises(ValueError, match="SimpleNamespace has no such attributes"):
        micro_batch(SimpleNamespace())


def shaped(rows: int, length: int) -> FixedBatches:
    data = FixedBatches([random_batch([length] * rows, length)])
    data.micro_batch_size, data.sequence_length = rows, length  # type: ignore[attr-defined]  # as stream modules have them
    return data


@pytest.mark.parametrize(("budget", "modes"), [("auto", ["selective", "selective"]), (420_000, ["full", "selective"])])
def test_a_run_chooses_by_its_budget(budget: Any, modes: list[str], tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), lora=lora(), activation_memory=budget)
    trainer(max_steps=1).fit(module, shaped(2, 64))
    assert module.activation_checkpointing == modes
    assert module.hparams["activation_memory"] == budget
    plain = PretrainModule(str(tiny_base), lora=lora(), activation_checkpointing="none")
    trainer(max_steps=1).fit(plain, shaped(2, 64))
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_evaluation_needs_no_budget(tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), activation_memory=1)
    trainer(limit_val_batches=1).validate(module, FixedBatches([random_batch([9])]), verbose=False)
    assert module.activation_checkpointing == "selective"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_checkpointing": "full"}, "`activation_checkpointing='full'` is given beside it. Leave one"),
        ({"activation_memory": -1}, "expected at least 1 byte, or auto"),
        ({"activation_memory": "much"}, "expected null or a whole number or auto"),
    ],
)
def test_settings_that_contradict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainModule("nowhere", **({"activation_memory": "auto"} | changes))


def test_too_small_a_budget(tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), lora=lora(), activation_memory=1000)
    with pytest.raises(ValueError, match="`activation_memory=1000`: even with all layers but one"):
        trainer(max_steps=1).fit(module, shaped(2, 64))
