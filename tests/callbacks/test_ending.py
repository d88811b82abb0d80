"""Why a run ended, in words that lead on."""

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mixcn.callbacks import FitSummary, PreemptionCheckpoint, StepCheckpoint
from lightning_mixcn.callbacks.defaults import run_logger
from lightning_mixcn.callbacks.ending import next_steps, resuming_command, why_ended
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]


def fitted(trainer: Make, module: PretrainModule, *callbacks: Callback, batches: int = 20, **settings: Any) -> Any:
    run = trainer(**({"max_steps": 6, "max_epochs": -1} | settings), callbacks=[*callbacks, FitSummary()])
    run.fit(module, FixedBatches([random_batch([9])] * batches))
    return run


class StopAfter(Callback):
    def __init__(self, step: int, **changes: Any) -> None:
        self.step, self.changes = step, changes

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True
            for name, value in self.changes.items():
                setattr(next(c for c in trainer.callbacks if type(c).__name__ == name), *value)


def test_a_command_that_goes_on_names_the_configuration(trainer: Make, tmp_path: Path) -> None:
    run = trainer(default_root_dir=str(tmp_path / "my run"))
    assert resuming_command(run) == 'fit(…, ckpt_path="last")'
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.yaml").touch()
    assert resuming_command(run) == f"mixcn fit --config '{tmp_path}/my run/config.yaml' --ckpt_path last"


def test_all_steps(trainer: Make, module: PretrainModule) -> None:
    assert why_ended(fitted(trainer, module)).startswith("all 6 steps; more with a larger `trainer.max_steps`")


def test_early_stopping(trainer: Make, module: PretrainModule) -> None:
    stopping = EarlyStopping("train/nll_nats_per_token", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    run = fitted(trainer, module, stopping, batches=1, max_steps=100)
    assert run.global_step < 100
    assert why_ended(run).startswith(f"EarlyStopping after step {run.global_step} of 100: ")
    assert "train/nll_nats_per_token" in why_ended(run)


def test_max_time(trainer: Make, module: PretrainModule) -> None:
    run = fitted(trainer, module, Timer(duration=timedelta(microseconds=1)), max_steps=100)
    assert (
        why_ended(run) == '`trainer.max_time` after step 1 of 100; more with a longer one and fit(…, ckpt_path="last")'
    )


def test_a_callback_s_wish(trainer: Make, module: PretrainModule) -> None:
    run = fitted(trainer, module, StopAfter(2))
    assert why_ended(run) == 'something asked for it after step 2 of 6; go on with fit(…, ckpt_path="last")'


def test_a_signal(trainer: Make, module: PretrainModule, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fitted(trainer, module, PreemptionCheckpoint(), StopAfter(2))
    assert run.global_step == 2
    monkeypatch.setattr(PreemptionCheckpoint, "ended_by", "SIGINT")
    assert why_ended(run) == 'SIGINT after step 2 of 6; go on with fit(…, ckpt_path="last")'


def test_epochs(trainer: Make, module: PretrainModule) -> None:
    run = fitted(trainer, module, batches=2, max_steps=100, max_epochs=2)
    assert why_ended(run) == "`trainer.max_epochs=2` after step 4 of 100; more with more epochs"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_run_that_was_complete(
    trainer: Make, module: PretrainModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving = StepCheckpoint(every_n_steps=1, dirpath=str(tmp_path))
    fitted(trainer, module, saving, max_steps=2, enable_checkpointing=True)
    caplog.clear()
    caplog.set_level(logging.INFO)
    settings = {"max_steps": 2, "max_epochs": -1, "enable_checkpointing": True}
    again = trainer(**settings, callbacks=[saving, FitSummary()])
    again.fit(module, FixedBatches([random_batch([9])]), ckpt_path=str(tmp_path / "last.ckpt"))
    assert "Nothing was trained: all 2 steps; more with a larger `trainer.max_steps`" in caplog.text


def test_what_is_next(trainer: Make, tmp_path: Path) -> None:
    run = trainer(default_root_dir=str(tmp_path), logger=TensorBoardLogger(str(tmp_path), name="tensorboard"))
    report = ("report", f"mixcn report {tmp_path} --out report.html")
    assert next_steps(run, None) == [("curves", f"tensorboard --logdir {tmp_path}"), report]
    assert next_steps(run, tmp_path)[1:] == [
        report,
        ("talk", f"mixcn chat {tmp_path}"),
        ("merge", f"mixcn export {tmp_path} OUT"),
    ]
    with_page = trainer(default_root_dir=str(tmp_path), logger=run_logger(tmp_path))
    assert next_steps(with_page, None)[1:] == [("first page", "http://localhost:6006/#custom_scalars"), report]
