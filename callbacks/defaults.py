"""What a run has without being asked: callbacks, logger and settings of the trainer, for commands and for Python."""

import os
import platform
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from lightning_mixcn import __version__
from lightning_mixcn.commands.table import TRAINER_DEFAULTS
from lightning_mixcn.library_lines import leave_out_of_runs
from lightning_mixcn.masking import mask_secrets, visible

from .adapter_checkpoint import AdapterCheckpoint
from .checkpoints import PreemptionCheckpoint, StepCheckpoint
from .clocks import StepProgressBar
from .compared_run import ByteBudget
from .data_monitor import DataMonitor
from .epoch_budget import EpochBudget
from .expert_load.report import FIRST_NUMBERS
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
    leave_out_of_runs()
    added = [DataMonitor(), *training_callbacks(), StepCheckpoint(), AdapterCheckpoint(), *logging_callbacks()]
    given = with_defaults(callbacks, [*added, StepProgressBar(), ParameterSummary()], Path(folder))
    return {**TRAINER_DEFAULTS, "default_root_dir": str(folder), "logger": run_logger(folder), "callbacks": given}


def training_callbacks() -> list[Callback]:
    """Make what watches a `fit`: signals, gradients, and what came of it."""
    return [PreemptionCheckpoint(), TrainabilityCheck(), FitSummary()]


def logging_callbacks() -> list[Callback]:
    """Make what logs a `fit` as it goes: learning rates and throughput."""
    return [LearningRateMonitor(logging_interval="step"), ThroughputLogger()]


def run_logger(folder: str | Path) -> "RunLogger":
    """Make the logger of a run's folder."""
    return RunLogger(str(folder), name=TENSORBOARD, version="", default_hp_metric=False)


# Charts of the tab CUSTOM SCALARS: TensorBoard's first tab is in alphabetical order. Tags are regular expressions.
_PAGE = {
    "loss": ["train/loss$", "train/nll_nats_per_token$"],
    "validation by language: bits per byte": [
        "val/bits_per_byte$",
        "val/.+/bits_per_byte$",
        "val_average/bits_per_byte$",
    ],
    "learning rate": ["lr-"],
    "throughput: tokens per second": ["throughput/tokens_per_second$"],
    "expert balance": [f"experts/({'|'.join(FIRST_NUMBERS)})$"],
}


# Tag of the text that says by which command, versions and machine a process of a run was.
ENVIRONMENT = "environment"
_LIBRARIES = ("lightning", "torch", "transformers", "peft", "bitsandbytes")


class RunLogger(TensorBoardLogger):
    """Lightning's logger, with a page of the curves to look at first, and hyper-parameters without ``hp_metric``.

    Attributes:
        first_page: Address of that page on TensorBoard's default port.
    """

    first_page = "http://localhost:6006/#custom_scalars"

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Write the page, command and versions, and the hyper-parameters that are set, nested ones as ``lora/r``."""
        super().log_hyperparams(params, metrics, step)
        self.experiment.add_custom_scalars({"run": {chart: ["Multiline", tags] for chart, tags in _PAGE.items()}})
        shown = dict(sorted(_flat(vars(params) if isinstance(params, Namespace) else params)))
        # `SummaryWriter.add_hparams` would make a run of its own; only the names of the metrics are used.
        for summary in hparams(shown, {"train/loss": None}):  # type: ignore[no-untyped-call]  # of torch
            self.experiment._get_file_writer().add_summary(summary)
        lines = (
            f"    {name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in shown.items()
        )
        self.experiment.add_text("hyper_parameters", "\n".join(lines))
        self.experiment.add_text(ENVIRONMENT, "\n".join(f"    {name}: {each}" for name, each in _environment().items()))


def _environment() -> dict[str, str]:
    """Return the command of this process, versions, and the machine, each in one line."""
    program = Path(sys.argv[0]).name
    command = shlex.join(["mixcn" if program == "__main__.py" else program, *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {machine}"
    versions = {"lightning_mixcn": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in _LIBRARIES}
    return {"command": " ".join(mask_secrets(visible(command)).split()), "machine": machine, **versions}


def _flat(params: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Yield what is set, as TensorBoard's table takes it; names with ``_`` in front are Lightning's."""
    for key, value in params.items():
        name = place if key in ("class_path", "init_args") else f"{place}/{key}".lstrip("/")
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif value is not None and not str(key).startswith("_"):
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield name, shown if isinstance(shown, bool | int | float | str) else str(shown)


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
