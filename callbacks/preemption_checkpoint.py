"""A checkpoint, and a normal end, when the machine is about to be taken away."""

import signal
import threading
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .step_checkpoint import StepCheckpoint

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionCheckpoint(Callback):
    """Ends `fit` on SIGTERM or SIGUSR1 as if it were done: saves through StepCheckpoint, and the process exits with 0.

    The step that runs is finished first, with all its micro-batches, on all ranks; one of them has to get the signal. A
    validation that would follow is left out, one that runs is finished, since half of it would log wrong numbers: have
    the scheduler give notice that is longer than a step or a validation (SLURM: ``--signal=USR1@300``), or shorten the
    latter (``trainer.limit_val_batches``). More signals change nothing. Before training, and in other subcommands, a
    signal ends the process as ever.
    """

    def __init__(self) -> None:
        self._received = 0  # the signal's number
        self._agreed = 0  # the same, on all ranks
        self._step = 0
        self._limits: tuple[Any, Any] | None = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on."""
        self._agreed = 0
        self._step = trainer.global_step
        self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where an optimizer step ended."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._stop_if_signalled(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop behind a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_signalled(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what happened; the trainer can be used again."""
        if self._limits is None:
            return
        host: Any = trainer
        host.limit_val_batches, host.fit_loop.epoch_loop.min_steps = self._limits
        self._limits = None
        saved = [callback.best_model_path for callback in _step_checkpoints(trainer)]
        where = (
            f"{saved[0]} is its checkpoint. Go on with --ckpt_path last"
            if saved
            else "there is no StepCheckpoint in `trainer.callbacks` to save it"
        )
        name = signal.Signals(self._agreed).name
        rank_zero_info(f"{name}: stopped after optimizer step {trainer.global_step}; {where}")

    def _listen(self) -> None:
        # Lightning's own handlers, set just before this, would raise an exception in the next micro-batch, enter a
        # collective from inside the handler, and under SLURM save in the middle of a step. It remembers what was there
        # before them for every signal, and restores that in the end. Python allows handlers in the main thread only.
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        if self._agreed:
            return
        self._agreed = self._received
        if trainer.world_size > 1:
            received = torch.tensor(self._received, device=trainer.strategy.root_device)
            self._agreed = int(trainer.strategy.reduce(received, reduce_op="max"))
        if not self._agreed:
            return
        for callback in _step_checkpoints(trainer):
            callback.request()
        # Lightning would validate before it stops early, and would not stop before `min_steps` and `min_epochs`.
        host: Any = trainer  # some of its attributes have no types
        self._limits = host.limit_val_batches, host.fit_loop.epoch_loop.min_steps
        host.limit_val_batches = 0
        host.fit_loop.epoch_loop.min_steps = None
        host.fit_loop.min_epochs = 0
        host.should_stop = True


def _step_checkpoints(trainer: Trainer) -> list[StepCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, StepCheckpoint)]
