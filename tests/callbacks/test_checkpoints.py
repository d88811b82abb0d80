"""Which checkpoints a run leaves."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_mixcn.callbacks import StepCheckpoint
from lightning_mixcn.callbacks import checkpoints as step_checkpoint
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.modules.checkpoints import publish, verify
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]

pytestmark = [
    # The batches of these tests are no resumable stream; they are all alike.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    # Resuming into the same folder is the point here.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def names(folder: Path) -> list[str]:
    """Names of the checkpoints; each has its sums beside it, and nothing else is there."""
    found = {path.name for path in folder.iterdir()}
    checkpoints = {name for name in found if name.endswith(".ckpt")}
    assert found == checkpoints | {f"{name}.sha256" for name in checkpoints - {"last.ckpt"}}
    return sorted(checkpoints)


def fit(module: PretrainModule, trainer: Make, folder: Path, steps: int, resume: str | None = None) -> None:
    checkpoint = StepCheckpoint(every_n_steps=2, dirpath=str(folder))
    run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint], accumulate_grad_batches=2)
    run.fit(module, FixedBatches([random_batch([9])] * 20), ckpt_path=resume)


def test_the_newest_two_and_the_last_step(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    fit(module, trainer, tmp_path, steps=7)
    assert names(tmp_path) == ["last.ckpt", "step=00000006.ckpt", "step=00000007.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000007.ckpt"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ({"keep": 3}, {"keep": 1}, [7]),
        ({"keep": 3}, {"keep": 2, "every_n_steps": 3}, [6, 7]),
        ({"keep": 1}, {"keep": 9}, [5, 6, 7]),
        ({"keep": 2}, {"keep": 2, "every_n_steps": 1}, [6, 7]),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning")
def test_a_resumed_run_keeps_as_many_as_it_is_told_now(
    before: dict[str, int],
    after: dict[str, int],
    kept: list[int],
    tmp_path: Path,
    module: PretrainModule,
    trainer: Make,
) -> None:
    for steps, settings, resume in ((5, before, None), (7, after, str(tmp_path / "last.ckpt"))):
        checkpoint = StepCheckpoint(**({"every_n_steps": 2} | settings), dirpath=str(tmp_path))
        run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint])
        run.fit(module, FixedBatches([random_batch([9])] * 20), ckpt_path=resume)
    assert names(tmp_path) == ["last.ckpt", *(f"step={step:08d}.ckpt" for step in kept)]


def test_a_step_is_left_to_a_request(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    class Postpones(StepCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            if trainer.global_step in (2, 4):
                self.postpone()
            if trainer.global_step == 4:
                self.request()
            super().on_train_batch_end(trainer, *arguments)

    checkpoint = Postpones(every_n_steps=2, keep=9, dirpath=str(tmp_path))
    run = trainer(max_steps=7, enable_checkpointing=True, callbacks=[checkpoint])
    run.fit(module, FixedBatches([random_batch([9])] * 20))
    assert names(tmp_path) == ["last.ckpt", *(f"step=0000000{step}.ckpt" for step in (4, 6, 7))]


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


def test_what_a_killed_run_left_is_removed(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    (tmp_path / ".step=00000009.ckpt.unfinished").mkdir()
    (tmp_path / ".step=00000009.ckpt.unfinished" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".step=00000009.ckpt.sha256.unfinished").write_text("half")
    fit(module, trainer, tmp_path, steps=2)
    assert names(tmp_path) == ["last.ckpt", "step=00000002.ckpt"]
    verify(tmp_path / "last.ckpt")


def test_the_oldest_is_removed_when_the_new_one_is_complete_and_linked(
    tmp_path: Path, module: PretrainModule, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(unfinished: Path, path: Path) -> None:
        if path.name == "step=00000006.ckpt":
            raise OSError("no space left")
        publish(unfinished, path)

    monkeypatch.setattr(step_checkpoint, "publish", no_space)
    with pytest.raises(OSError, match="no space left"):
        fit(module, trainer, tmp_path, steps=8)
    # Not sealed, not seen; what was there before stays.
    assert sorted(path.name for path in tmp_path.glob("[!.]*.ckpt")) == [
        "last.ckpt",
        "step=00000002.ckpt",
        "step=00000004.ckpt",
    ]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000004.ckpt"


def test_a_folder_that_is_saved_again_leaves_the_link_on_a_complete_one(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"step={step:08d}.ckpt").mkdir()
    last = tmp_path / "last.ckpt"
    last.symlink_to("step=00000004.ckpt")
    step_checkpoint._point_elsewhere(last, tmp_path / "step=00000004.ckpt")
    assert last.resolve().name == "step=00000002.ckpt"


@pytest.mark.multiprocess
def test_sharded_checkpoints_of_two_ranks(tmp_path: Path) -> None:
    for steps in (3, 5):
        subprocess.run([sys.executable, "-c", SHARDED, str(tmp_path), str(steps)], check=True, timeout=240)
    assert sorted(path.name for path in tmp_path.glob("*ckpt*")) == [
        "last.ckpt",
        "step=00000004.ckpt",
        "step=00000005.ckpt",
    ]
    newest = (tmp_path / "last.ckpt").resolve()
    assert newest.name == "step=00000005.ckpt"
    assert sorted(path.name for path in newest.iterdir()) == [
        ".metadata",
        "SHA256SUMS",
        "__0_0.distcp",
        "__1_0.distcp",
        "meta.pt",
    ]
    verify(newest)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=newest, check=True)
    assert torch.load(newest / "meta.pt", weights_only=True)["global_step"] == 5


# Two ranks train to a step, from `last` if there is one; each holds half of what trains.
SHARDED = """
import os, sys
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from lightning_mixcn.callbacks import StepCheckpoint
from lightning_mixcn.modules.checkpoints import check_before_loading

folder, steps = sys.argv[1], int(sys.argv[2])

class Module(LightningModule):
    def setup(self, stage):
        check_before_loading(self.trainer)

    def configure_model(self):
        self.linear = torch.nn.Linear(8, 8)
        fully_shard(self.linear, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.linear(batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.linear.parameters())

def train(rank):
    os.environ["LOCAL_RANK"] = str(rank)
    meet = f"file://{folder}/meet{steps}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[StepCheckpoint(every_n_steps=1, dirpath=folder)],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(99, 8)), ckpt_path="last")
    assert trainer.global_step == steps

torch.set_num_threads(1)
start_processes(train, nprocs=2, start_method="fork")
"""


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"keep": 0}])
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        StepCheckpoint(**arguments)
