"""Which checkpoints a run leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mixcn.callbacks import StepCheckpoint
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]

pytestmark = [
    # transformers 5.23 still reads its own old name of the flag, which PEFT asks for.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # The batches of these tests are no resumable stream; they are all alike.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    # Resuming into the same folder is the point here.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fit(module: PretrainModule, trainer: Make, folder: Path, steps: int, resume: str | None = None) -> None:
    checkpoint = StepCheckpoint(every_n_steps=2, dirpath=str(folder))
    run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint], accumulate_grad_batches=2)
    run.fit(module, FixedBatches([random_batch([9])] * 20), ckpt_path=resume)


def test_the_newest_two_and_the_last_step(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    fit(module, trainer, tmp_path, steps=7)
    assert names(tmp_path) == ["last.ckpt", "step=00000006.ckpt", "step=00000007.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000007.ckpt"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


def test_a_resumed_run_does_not_save_amid_an_accumulation(
    tmp_path: Path, module: PretrainModule, trainer: Make
) -> None:
    fit(module, trainer, tmp_path, steps=4)
    again = PretrainModule(module.base, dtype="float32", lora=module.lora)
    fit(again, trainer, tmp_path, steps=6, resume="last")
    assert names(tmp_path) == ["last.ckpt", "step=00000004.ckpt", "step=00000006.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000006.ckpt"


def test_a_run_that_stops_keeps_its_last_good_checkpoint(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    class Broken(PretrainModule):
        def compute_loss(self, batch: Any, output: Any) -> Any:
            loss, count = super().compute_loss(batch, output)
            return loss * (float("nan") if self.trainer.global_step == 3 else 1.0), count

    broken = Broken(module.base, dtype="float32", lora=module.lora)
    with pytest.raises(FloatingPointError, match=r"step 3 .*Resume from the last checkpoint, .*step=00000002.ckpt"):
        fit(broken, trainer, tmp_path, steps=6)
    assert names(tmp_path) == ["last.ckpt", "step=00000002.ckpt"]
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in content["state_dict"].values())


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"keep": 0}])
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        StepCheckpoint(**arguments)
