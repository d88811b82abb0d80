"""Checkpoints by optimizer step, and one of the last step."""

import contextlib
import os
import re
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from weakref import proxy

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_mixcn.arguments import Between, Name, Steps, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import (
    naming_output,
    owned,
    remove_leftovers,
    removed_after_error,
    replace_link,
    unfinished_path,
)
from lightning_mixcn.modules.checkpoints import SUMMED_KEY, publish, remove

from .ending import resuming_command

_STEP = re.compile(r"step=(\d+)\.ckpt")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
CHECKPOINT_FILES = r"(?:step=\d+|last)\.ckpt(?:\.sha256)?"


class StepCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, set to keep the newest few and to save the last step of a run, too.

    A checkpoint has its name only when it is whole: it is written under another, summed (``sha256sum -c`` checks it),
    and renamed. Only then is the oldest removed. ``last.ckpt`` is a link to the newest, which is changed in one step,
    so that ``--ckpt_path last`` works after a kill at any moment.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: Number of the newest that stay; two, so that a broken disk write leaves one.
        dirpath: Folder; null is ``checkpoints/`` in the run's folder.
    """

    def __init__(
        self,
        every_n_steps: Steps = 500,
        keep: Annotated[int, Between(1, 10**6, "checkpoints")] = 2,
        dirpath: Name | None = None,
    ) -> None:
        check_arguments(StepCheckpoint, locals())
        if dirpath is not None and (Path(dirpath.strip()).name in ("", "..") or _CONTROL.search(dirpath)):
            raise UserError(
                f"`dirpath={dirpath!r}`: expected a folder for checkpoints, or null for the run's checkpoints/"
            )
        super().__init__(
            dirpath=dirpath,
            filename="step={step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last="link",
            every_n_train_steps=every_n_steps,
            # A step that is saved again after a kill takes its old name, and `last.ckpt` has no second.
            enable_version_counter=False,
        )
        self._requested = self._postponed = self._summing = False
        self._outdated: list[str] = []  # of a run that kept more; removed once the next one is saved

    def postpone(self) -> None:
        """Leave this step to `request`, whatever ``every_n_steps`` says; called on all ranks, before the step's save.

        For a step that is validated: a checkpoint from before it would go on after the validation, without it.
        """
        self._postponed = True

    def request(self) -> None:
        """Save at the end of the hook that runs, whatever ``every_n_steps`` says; called on all ranks.

        Other callbacks' work of the step is done by then: Lightning calls those that save last.
        """
        self._requested = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the step that a resumed run starts from as saved.

        Else ModelCheckpoint would save it again, after the next micro-batch: in the middle of an accumulation.
        """
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        if trainer.is_global_zero and trainer.global_step > 0 and self.dirpath is not None:
            remove_leftovers(Path(self.dirpath), CHECKPOINT_FILES)
        if trainer.global_step > 0:
            self._adopt(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note in a checkpoint of this callback's that it is not complete without its sums."""
        if self._summing:
            checkpoint[SUMMED_KEY] = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a step that is a multiple of ``every_n_steps``, or that was requested."""
        if not self._postponed:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._postponed = False
        self._save_requested(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it was requested."""
        super().on_validation_end(trainer, pl_module)
        self._save_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step where it is not a multiple of ``every_n_steps``."""
        if trainer.global_step > 0:
            self._save(trainer)

    def _adopt(self, trainer: Trainer) -> None:
        """Take over the checkpoints that are there, whatever the one that was loaded says of them.

        Where ``every_n_steps`` or the folder was changed Lightning does not restore this callback's state, and where
        ``keep`` was lowered ModelCheckpoint would never remove what is too much.
        """
        assert self.dirpath is not None
        matches = [match for path in Path(self.dirpath).glob("step=*.ckpt") if (match := _STEP.fullmatch(path.name))]
        found = {int(match[1]): str(Path(self.dirpath, match[0])) for match in matches}
        found = trainer.strategy.broadcast(found)
        steps = sorted(step for step in found if step <= trainer.global_step)
        kept = steps[-self.save_top_k :]
        self._outdated = [found[step] for step in steps[: -self.save_top_k]]
        self.best_k_models = {found[step]: torch.tensor(step) for step in kept}
        if kept:
            self.kth_best_model_path, self.kth_value = found[kept[0]], torch.tensor(kept[0])
            self.best_model_path, self.best_model_score = found[kept[-1]], torch.tensor(kept[-1])

    def _save_requested(self, trainer: Trainer) -> None:
        if self._requested:
            self._requested = False
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        path = Path(filepath)
        last = path.with_name(f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        if trainer.is_global_zero:
            remove_leftovers(path.parent, CHECKPOINT_FILES)
            _point_elsewhere(last, path)
        trainer.strategy.barrier()
        # Other callbacks write while the state is collected: a run that is killed then was writing a checkpoint.
        with naming_output(path), owned(path) if trainer.is_global_zero else nullcontext():
            with removed_after_error(unfinished_path(path)) if trainer.is_global_zero else nullcontext():
                self._summing = True
                trainer.save_checkpoint(unfinished_path(path), self.save_weights_only)
                self._summing = False
                if trainer.is_global_zero and not last.exists():
                    # The first one: a kill between the two would leave a checkpoint that is not the last one.
                    replace_link(last, path)
                publish(unfinished_path(path), path)
            # Before ModelCheckpoint removes the oldest, which may be what it points to.
            self._link_checkpoint(trainer, filepath, str(last))
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        while self._outdated:
            self._remove_checkpoint(trainer, self._outdated.pop())
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            remove(Path(filepath))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        # ModelCheckpoint removes the old link before it makes the new one.
        if trainer.is_global_zero:
            replace_link(Path(linkpath), Path(filepath))
        trainer.strategy.barrier()


def restore_last(folder: Path) -> None:
    """Make the newest checkpoint of a folder the last one where a process was killed between the two.

    Without any, a last one leads nowhere: to the first, which was not written.
    """
    found, last = sorted(folder.glob("step=*.ckpt")), folder / "last.ckpt"
    if last.exists() or not any(folder.glob(".step=*.ckpt.lock")):
        return
    if found:
        replace_link(last, found[-1])
    elif last.is_symlink():
        last.unlink()


def _point_elsewhere(link: Path, path: Path) -> None:
    """Have a link point to another checkpoint before a folder is replaced, which takes two steps."""
    if path.is_dir() and link.is_symlink() and link.resolve() == path.resolve():
        others = [other for other in sorted(path.parent.glob("step=*.ckpt")) if other.name < path.name]
        if others:
            replace_link(link, others[-1])


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_INTERRUPTS = 2  # the last one ends at once
# torchrun passes Ctrl-C on to ranks that the terminal has sent it to already; nobody presses it twice so fast.
_ECHO_SECONDS = 0.5
_INTERRUPTED = b"""
Ctrl-C: the step that runs is finished and saved. Press it again to end at once, without saving.
"""


class PreemptionCheckpoint(Callback):
    """Ends `fit` on SIGTERM, SIGUSR1, SIGHUP or Ctrl-C as if it were done: saves through StepCheckpoint first.

    The process then exits with 0, after Ctrl-C with 130, so that a script does not take the run for whole. The step
    that runs is finished first, with all its micro-batches, on all ranks; one of them has to get the signal. A
    validation that would follow is left out, one that runs is finished, since half of it would log wrong numbers: have
    the scheduler give notice that is longer than a step or a validation (SLURM: ``--signal=USR1@300``), or shorten the
    latter (``trainer.limit_val_batches``). More signals change nothing, but a second Ctrl-C ends at once, without
    saving. Before training, and in other subcommands, a signal ends the process at once. What is ignored, as SIGHUP
    under ``nohup``, stays ignored.
    """

    def __init__(self) -> None:
        self._received = 0  # the signal's number
        self._interrupts, self._interrupted_at = 0, 0.0
        self._terminals: list[int] = []
        self._is_first_rank = True
        self._agreed = 0  # the same, on all ranks
        self._step = 0
        self._limits: tuple[Any, Any] | None = None

    @property
    def interrupted(self) -> bool:
        """Tell whether Ctrl-C ended the last `fit`."""
        return self._agreed == signal.SIGINT

    @property
    def ended_by(self) -> str:
        """Name the signal that ended the last `fit`; empty if none did."""
        return signal.Signals(self._agreed).name if self._agreed else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the signals of a `fit` before this one."""
        self._received = self._agreed = self._interrupts = 0
        self._is_first_rank = trainer.is_global_zero

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on."""
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
        """Stop after a validation."""
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
            f"{saved[0]} is its checkpoint. Go on with: {resuming_command(trainer)}"
            if saved
            else "there is no StepCheckpoint in `trainer.callbacks` to save it"
        )
        rank_zero_info(f"{self.ended_by}: stopped after optimizer step {trainer.global_step}; {where}")

    def _listen(self) -> None:
        # Lightning's own handlers, set just before this, would raise an exception in the next micro-batch, enter a
        # collective from inside the handler, and under SLURM save in the middle of a step. It remembers what was there
        # before them for every signal, and restores that in the end. Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._terminals = [number for number in (1, 2) if os.isatty(number)]
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupts and now - self._interrupted_at < _ECHO_SECONDS:
                return
            self._interrupts, self._interrupted_at = self._interrupts + 1, now
            if self._interrupts == _INTERRUPTS:
                raise KeyboardInterrupt
            if self._is_first_rank:
                with contextlib.suppress(OSError):  # not `print`: it may be what the signal came into
                    os.write(2, _INTERRUPTED)
        elif number == signal.SIGHUP:
            self._leave_terminal()

    def _leave_terminal(self) -> None:
        """Print nowhere where the terminal is gone: the progress bar's next line would end the run, unsaved."""
        for terminal in self._terminals:
            if not os.isatty(terminal):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, terminal)
                os.close(nowhere)

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
