"""A run's folder has one writer: its lock, the ranks that find it taken, and what a killed process left."""

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lightning_mixcn.callbacks import AdapterCheckpoint, SampleText
from lightning_mixcn.cli import run_folder
from lightning_mixcn.cli.trainer import MixcnCLI
from tests.cli.test_run_folder import ROOT, one_step
from tests.cli.test_trainer import run


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a configuration of one step, whose folder is ``runs/tiny``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return one_step(tmp_path, tiny_base)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(config: dict[str, Any]) -> None:
    assert run(config) == 0
    (ROOT / ".fit.lock").touch()  # of a process that was killed
    assert run(config) == 2  # there is something to go on from
    (ROOT / ".fit.lock").touch()
    shutil.rmtree(ROOT / "checkpoints")
    assert run(config) == 2  # an adapter that no checkpoint has followed
    (ROOT / ".fit.lock").touch()
    (ROOT / "checkpoints").mkdir()
    (ROOT / "checkpoints" / ".step=00000001.ckpt.lock").touch()  # it was following when the kill came
    assert run(config) == 0
    assert not list(ROOT.rglob(".*"))
    assert run(config) == 2


def test_a_run_that_failed_before_its_first_checkpoint_begins_again(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(SampleText, "on_train_start", fail)
        assert run(config) == 2
    assert (ROOT / "config.yaml").exists()
    assert run(config) == 0
    assert not list(ROOT.glob(".*"))
    config["trainer"]["max_steps"] = 2
    with monkeypatch.context() as patch:
        patch.setattr(SampleText, "on_train_start", fail)
        assert run(config, "fit", "--ckpt_path=last") == 2
    assert run(config) == 2  # there is a checkpoint to go on from


def test_a_run_that_was_killed_at_a_later_checkpoint_keeps_the_earlier_one(config: dict[str, Any]) -> None:
    (ROOT / "checkpoints").mkdir(parents=True)
    (ROOT / ".fit.lock").touch()
    (ROOT / "checkpoints" / ".epoch=0-step=2.ckpt.lock").touch()
    (ROOT / "checkpoints" / "epoch=0-step=1.ckpt").touch()  # the only one of a plain ModelCheckpoint, without a link
    assert run(config) == 2
    assert (ROOT / "checkpoints" / "epoch=0-step=1.ckpt").exists()


def test_ranks_that_start_after_the_first_one_run_the_same_callbacks(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that Lightning launches, or on a slower machine, finds the first one's lock; its barriers are the same."""
    found = list[list[type[Callback]]]()

    def keep(cli: MixcnCLI, subcommand: str) -> None:
        found.append(list(map(type, cli.trainer.callbacks)))  # type: ignore[attr-defined]

    monkeypatch.setattr(MixcnCLI, "_run_subcommand", keep)
    assert run(config) == 0
    ROOT.mkdir(parents=True)
    (ROOT / ".fit.lock").touch()
    assert run(config) == 0
    assert found[0] == found[1]
    (ROOT / "checkpoints").mkdir()
    for name in ("step=00000001.ckpt", "last.ckpt", ".step=00000001.ckpt.lock"):  # the first one has made the link
        (ROOT / "checkpoints" / name).touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(config) == 0


def test_an_evaluation_takes_no_lock_of_training_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that goes on beside it would end where it finds one taken, however briefly."""
    taken = list[Path]()

    def owned(out: Path, *rest: str) -> AbstractContextManager[None]:
        taken.append(out)
        return nullcontext()

    monkeypatch.setattr(run_folder, "owned", owned)
    (tmp_path / ".samples.jsonl.partial").touch()
    callbacks: list[Callback] = [AdapterCheckpoint()]
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=callbacks)
    with run_folder.running(trainer, tmp_path, "validate"):
        assert taken == [tmp_path / "validate"]
        assert (tmp_path / ".samples.jsonl.partial").exists()
