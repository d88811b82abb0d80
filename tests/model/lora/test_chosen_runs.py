"""Runs that train some experts only: what they hold, how they go on, and on two ranks."""

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn.callbacks import StepCheckpoint, TrainabilityCheck
from lightning_mixcn.errors import UserError
from lightning_mixcn.model import load_moe
from lightning_mixcn.model.lora.adapter_file import StoredFactors
from lightning_mixcn.model.lora.attach import stored_adapter
from lightning_mixcn.model.lora.choice import TrainOnly
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed, save_tiny_model
from tests.modules import strategy_run

SOME: dict[str, Any] = {"experts": {"0": [1, 2], "1": [3]}, "attention": False}
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:TrainabilityCheck. no gradient has come back to:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("base"), "mixtral"))


def fit(base: str, out: Path, steps: int, *, resume: bool = False, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "lora": LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "lr_scheduler": partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        "train_only": SOME,
    }
    saving = StepCheckpoint(every_n_steps=1, dirpath=str(out))
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=out, callbacks=[saving, TrainabilityCheck()],
    )  # fmt: skip
    path = str(out / "last.ckpt") if resume else None
    trainer.fit(PretrainModule(base, **(settings | changes)), FixedBatches([random_batch([20, 24])]), ckpt_path=path)
    return trainer


def states(trainer: Trainer) -> list[Tensor]:
    """Return the optimizer's states of more than one number."""
    found = (value for state in trainer.optimizers[0].state.values() for value in state.values())
    return [value for value in found if isinstance(value, Tensor) and value.ndim]


def trained(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach() for parameter in trainer.lightning_module.parameters() if parameter.requires_grad]


def written(trainer: Trainer) -> list[StoredFactors]:
    """Return what an adapter file has."""
    return list(stored_adapter(cast(Any, trainer.lightning_module).model)[0].values())


def test_the_optimizer_holds_what_is_chosen(base: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["w1", "w2", "w3"])
    whole, half = (
        fit(base, tmp_path / name, 1, lora=lora, train_only=choice)
        for name, choice in (("whole", None), ("half", {"experts": [0, 3]}))
    )
    for tensors in (states, trained):
        assert sum(value.nbytes for value in tensors(half)) * 2 == sum(value.nbytes for value in tensors(whole)) > 0


@pytest.mark.parametrize("start", [None, "rounding_error"])
def test_a_run_that_is_resumed_ends_as_one_that_is_not(start: Any, base: str, tmp_path: Path) -> None:
    (tmp_path / "choice.json").write_text(json.dumps(SOME | {"about": {"made by": "hand"}}))
    go = partial(fit, base, lora_start=start)
    whole = go(tmp_path / "whole", 4)
    go(tmp_path / "parts", 2)
    resumed = go(tmp_path / "parts", 4, resume=True, train_only=str(tmp_path / "choice.json"))
    for tensors in (states, trained):
        for one, other in zip(tensors(whole), tensors(resumed), strict=True):
            assert torch.equal(one, other)
    for factors, again in zip(written(whole), written(resumed), strict=True):
        assert torch.equal(factors.a, again.a)
        assert torch.equal(factors.b, again.b)


@pytest.mark.parametrize("start", [None, "rounding_error"])
def test_another_start_is_refused_on_resume(start: Any, base: str, tmp_path: Path) -> None:
    fit(base, tmp_path, 1, train_only=None, lora_start=start)
    other, place = (None, "in it, but not here") if start else ("rounding_error", "here, but not in it")
    with pytest.raises(UserError, match=f"do not go on from the same start: .* of NF4 {place}") as caught:
        fit(base, tmp_path, 2, resume=True, train_only=None, lora_start=other)
    assert "\n" not in str(caught.value)


def test_another_choice_is_refused_on_resume(base: str, tmp_path: Path) -> None:
    fit(base, tmp_path, 1)
    cases: list[tuple[Any, str]] = [
        (SOME | {"experts": {"0": [1, 2], "1": [0]}}, r"experts \[3\] in .*layers.1.* but `train_only` chooses \[0\]"),
        (SOME | {"experts": {"0": [1, 2]}}, r"adapts model.layers.1.mlp.experts.*`train_only` leaves it out"),
        ({**SOME, "attention": True}, r"no adapter of model.layers.0.self_attn.*`train_only` is another"),
        ({"attention": False}, r"experts \[1, 2\] in .*, but `train_only` chooses all"),
    ]
    for choice, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            fit(base, tmp_path, 2, resume=True, train_only=choice)
        assert "Give `lora` and `train_only` in `model.init_args` as they were" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_options_that_need_what_is_not_chosen(base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`learning_rates`: attention trains nothing here"):
        fit(base, tmp_path, 1, learning_rates={"attention": 0.5})
    with pytest.raises(UserError, match="`train_only` chooses what has LoRA, but `lora` is null"):
        fit(base, tmp_path, 1, lora=None, train_embeddings=True)
    fit(base, tmp_path, 1, learning_rates={"router": 0.5, "embeddings": 0.1}, train_embeddings=True)


@pytest.mark.multiprocess
def test_two_ranks_train_as_one_does(tmp_path: Path, base: str) -> None:
    """From an adapter of fewer experts. Nine rows are the factors of three: FSDP2 cuts inside of an expert's."""
    choice: TrainOnly = {"experts": {"0": [0, 1, 3], "1": [2]}, "router": False}
    fewer: TrainOnly = {"experts": {"0": [1], "1": [2]}, "router": False}
    lora, adapter = strategy_run.lora(r=3), str(tmp_path / "adapter")
    before: Any = load_moe(base, lora=lora, train_only=fewer, seed=5)
    before.save_pretrained(adapter)  # experts 0 and 3 of layer 0 have a start of their own
    train = partial(strategy_run.train, max_steps=3, lora=lora, train_only=choice, adapter=adapter)
    (one,) = run_distributed(train, 1, ["one"], base, str(tmp_path))
    for of_rank in run_distributed(train, 2, ["fsdp2"], base, str(tmp_path / "two")):
        found, expected = of_rank["fsdp2"], one["one"]
        assert found["base"] == expected["base"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["adapter"].keys() == expected["adapter"].keys()
        for key, values in expected["adapter"].items():
            assert torch.linalg.norm(found["adapter"][key] - values) <= 1e-4 * torch.linalg.norm(values), key
