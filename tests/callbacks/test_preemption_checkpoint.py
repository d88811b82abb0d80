"""Signals end a run at the end of a step, with a checkpoint that goes on as if nothing had been."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_mixcn.callbacks import PreemptionCheckpoint, StepCheckpoint
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Trainer]


class Signals(Callback):
    """Sends this process signals in the first micro-batch after a step, or in a validation."""

    def __init__(self, *numbers: int, after_step: int = 1, in_validation: bool = False) -> None:
        self.numbers, self.after_step, self.in_validation = numbers, after_step, in_validation
        self.validation_batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after_step and not self.in_validation:
            self._send()

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.validation_batches += 1
        if trainer.global_step == self.after_step and self.in_validation:
            self._send()

    def _send(self) -> None:
        numbers, self.numbers = self.numbers, ()
        for number in numbers:
            signal.raise_signal(number)


def fit(module: PretrainModule, trainer: Make, folder: Path, signals: Signals, **changes: Any) -> Trainer:
    callbacks = [PreemptionCheckpoint(), StepCheckpoint(every_n_steps=100, dirpath=str(folder)), signals]
    settings = {"max_steps": 6, "max_epochs": -1, "accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
    run = trainer(**(settings | changes), enable_checkpointing=True, callbacks=callbacks)
    run.fit(module, FixedBatches([random_batch([9])] * 20))
    return run


def saved(folder: Path) -> str:
    return (folder / "last.ckpt").resolve().name


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGUSR1,), (signal.SIGTERM, signal.SIGTERM)])
def test_a_signal_ends_the_run_at_the_end_of_the_step(
    tmp_path: Path, module: PretrainModule, trainer: Make, numbers: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with caplog.at_level("INFO"):
        run = fit(module, trainer, tmp_path, Signals(*numbers))
    assert run.global_step == 2
    assert saved(tmp_path) == "step=00000002.ckpt"
    loops = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert loops["epoch_progress"]["current"]["processed"] == 0  # the epoch is not over: data that end go on in it
    name = signal.Signals(numbers[-1]).name
    assert f"{name}: stopped after optimizer step 2; {tmp_path}/step=00000002.ckpt is its" in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("limits", [{"min_steps": 5}, {"min_epochs": 3}])
def test_lower_limits_do_not_hold_it_up(
    tmp_path: Path, module: PretrainModule, trainer: Make, limits: dict[str, int]
) -> None:
    run = fit(module, trainer, tmp_path, Signals(signal.SIGTERM), **limits)
    assert run.global_step == 2
    assert run.min_steps == limits.get("min_steps")


def test_a_validation_that_is_due_is_left_out(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    signals = Signals(signal.SIGTERM)
    run = fit(module, trainer, tmp_path, signals, limit_val_batches=2, val_check_interval=6)
    assert run.global_step == 2
    assert signals.validation_batches == 0
    assert run.limit_val_batches == 2


def test_a_validation_that_runs_is_finished(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    signals = Signals(signal.SIGTERM, after_step=2, in_validation=True)
    run = fit(module, trainer, tmp_path, signals, limit_val_batches=2, val_check_interval=6)
    assert run.global_step == 2
    assert signals.validation_batches == 2
    assert saved(tmp_path) == "step=00000002.ckpt"


def test_without_step_checkpoint_it_says_so(
    module: PretrainModule, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(callbacks=[PreemptionCheckpoint(), Signals(signal.SIGUSR1, after_step=0)], max_steps=3)
    with caplog.at_level("INFO"):
        run.fit(module, FixedBatches([random_batch([9])] * 3))
    assert run.global_step == 1
    assert "SIGUSR1: stopped after optimizer step 1; there is no StepCheckpoint" in caplog.text


@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_mixcn_fit_exits_with_0_and_goes_on(
    ranks: int, workers: int, forked_fits: Any, fit_config: Path, tmp_path: Path
) -> None:
    content = json.loads(fit_config.read_text())
    content["data"]["init_args"]["num_workers"] = workers
    content["trainer"] |= {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "max_steps": 60}
    config = tmp_path / "fit.yaml"
    config.write_text(json.dumps(content))

    def start(folder: str) -> Path:
        arguments = ["--trainer.default_root_dir", folder, "--ckpt_path", "last"]
        forked_fits.start(tmp_path, ["fit", "--config", str(config), *arguments], ranks)
        return tmp_path / folder / "checkpoints"

    checkpoints = start("signalled")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        forked_fits.wait_for(checkpoints, "step=*.ckpt")
        time.sleep(0.1)
        signalled = psutil.Process(forked_fits.processes()[-1])  # one rank, not the one that writes
        for process in [*signalled.children(recursive=True), signalled]:  # SLURM's way
            process.send_signal(number)
        log = forked_fits.log
        assert forked_fits.wait() == [0] * ranks, log.read_text()[-4000:]
        assert f"{number.name}: stopped after optimizer step" in log.read_text()
        reached = (checkpoints / "last.ckpt").resolve().name
        assert reached != "step=00000060.ckpt"
        start("signalled")
        forked_fits.wait_for(checkpoints, f"step={int(reached[5:13]) + 1:08d}.ckpt")
    assert forked_fits.wait() == [0] * ranks
    whole = start("whole")
    assert forked_fits.wait() == [0] * ranks
    state, expected = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (checkpoints, whole))
    assert state["global_step"] == expected["global_step"] == 60
    for name, value in expected["state_dict"].items():
        assert torch.equal(state["state_dict"][name], value), name
