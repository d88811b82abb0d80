"""What a run has without being asked: callbacks, logger and settings of the trainer, for commands and for Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mixcn.commands.table import TRAINER_DEFAULTS

from .adapter_checkpoint import AdapterCheckpoint
from .checkpoints import PreemptionCheckpoint, StepCheckpoint
from .clocks import StepProgressBar
from .compared_run import ByteBudget
from .data_monitor import DataMonitor
from .epoch_budget import EpochBudget
from .host import CHECKPOINTS, TENSORBOARD
from .parameter_summary import ParameterSummary
from .reports import FitSummary
from .throughput_logger import ThroughputLogger
from .trainability_check import TrainabilityCheck


def trainer_defaults(folder: str | Path, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Return arguments of Lightning's Trainer that make a run from Python what `mixcn fit` makes of it.

    They have its settings, its TensorBoard logger, and its callbacks: checkpoints that resume exactly, adapters, the
    end on Ctrl-C or SIGTERM, checks of gradients, learning rates, throughput, progress and the table at the end.

    >>> trainer = Trainer(**trainer_defaults("runs/zh"), max_steps=1000)  # doctest: +SKIP

    Args:
        folder: Folder of the run, ``default_root_dir``.
        callbacks: Further ones; one of the kind of a default takes its place.
    """
    added = [DataMonitor(), *training_callbacks(), StepCheckpoint(), AdapterCheckpoint(), *logging_callbacks()]
    given = with_defaults(callbacks, [*added, StepProgressBar(), ParameterSummary()], Path(folder))
    return {**TRAINER_DEFAULTS, "default_root_dir": str(folder), "logger": run_logger(folder), "callbacks": given}


def training_callbacks() -> list[Callback]:
    """Make what watches a `fit`: signals, gradients, and what came of it."""
    return [PreemptionCheckpoint(), TrainabilityCheck(), FitSummary()]


def logging_callbacks() -> list[Callback]:
    """Make what logs a `fit` as it goes: learning rates and throughput."""
    return [LearningRateMonitor(logging_interval="step"), ThroughputLogger()]


def run_logger(folder: str | Path) -> TensorBoardLogger:
    """Make the logger of a run's folder."""
    return TensorBoardLogger(str(folder), name=TENSORBOARD, version="")


def with_defaults(callbacks: Sequence[Callback], defaults: Sequence[Callback], folder: Path) -> list[Callback]:
    """Add the defaults whose kind is not there yet; checkpoints without a folder go into the run's.

    Args:
        callbacks: Those that were asked for.
        defaults: Those of every run.
        folder: Folder of the run.
    """
    found = list(callbacks)
    for callback in defaults:
        if not any(isinstance(other, _kinds(callback)) for other in found):
            found.append(callback)
    for callback in found:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str((folder / CHECKPOINTS).resolve())
    return found


def _kinds(callback: Callback) -> type[Callback] | tuple[type[Callback], ...]:
    """Return the classes whose presence makes a default callback superfluous."""
    for kind in (ModelCheckpoint, ModelSummary, ProgressBar):
        if isinstance(callback, kind):
            return kind
    return (EpochBudget, ByteBudget) if isinstance(callback, EpochBudget) else type(callback)
