"""Why a run ended, and what a person does next, in words."""

import shlex
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mixcn.data import StreamDataModule

_CONFIG = "config.yaml"


def resuming_command(trainer: Trainer) -> str:
    """Return the command that goes on with a run from its last checkpoint.

    Args:
        trainer: Lightning's. Where the command line did not make it, there is no configuration to name: then it is the
            call from Python.
    """
    config = Path(trainer.default_root_dir, _CONFIG)
    if not config.is_file():
        return 'fit(…, ckpt_path="last")'
    return f"mixcn fit --config {shlex.quote(str(config))} --ckpt_path last"


def why_ended(trainer: Trainer) -> str:
    """Say why a `fit` has ended, and what makes it longer.

    Args:
        trainer: Lightning's, after its last step.
    """
    step, planned = trainer.global_step, trainer.max_steps
    of_all = f"after step {step:,}" + (f" of {planned:,}" if planned > 0 else "")
    if 0 < planned <= step:
        return f"all {planned:,} steps; more with a larger `trainer.max_steps` and {resuming_command(trainer)}"
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if name := getattr(callback, "ended_by", ""):  # PreemptionCheckpoint's
            return f"{name} {of_all}; go on with {resuming_command(trainer)}"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping {of_all}: {callback.stopping_reason_message.rstrip('.')}"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return f"`trainer.max_time` {of_all}; more with a longer one and {resuming_command(trainer)}"
    if trainer.should_stop:
        return f"something asked for it {of_all}; go on with {resuming_command(trainer)}"
    if trainer.max_epochs not in (None, -1) and trainer.current_epoch >= (trainer.max_epochs or 0):
        return f"`trainer.max_epochs={trainer.max_epochs}` {of_all}; more with more epochs"
    data: Any = getattr(trainer, "datamodule", None)
    if isinstance(data, StreamDataModule) and (ended := data.ended_sources()):
        return f"the data end {of_all}: {', '.join(ended)}; more with a larger `max_epochs` of the sources"
    return of_all


def next_steps(trainer: Trainer, adapter: Path | None) -> list[tuple[str, str]]:
    """Return what can be done with the results of a run: a name, and the command.

    Args:
        trainer: Lightning's.
        adapter: Folder of the adapter; ``None`` if none was written.
    """
    root = shlex.quote(str(trainer.default_root_dir))
    logged = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    steps = [("curves", f"tensorboard --logdir {shlex.quote(str(logger.save_dir))}") for logger in logged[:1]]
    steps += [("first page", logger.first_page) for logger in logged[:1] if hasattr(logger, "first_page")]
    steps.append(("report", f"mixcn report {root} --out report.html"))
    if adapter is not None:
        steps += [("talk", f"mixcn chat {root}"), ("merge", f"mixcn export {root} OUT")]
    return steps
