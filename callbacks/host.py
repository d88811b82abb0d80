"""What callbacks have in common: checks of modules and names, records of steps, figures and texts for any logger."""

import io
import json
import re
from collections.abc import Collection, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, WandbLogger

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import append_lines, keep_lines, new_file, write_text
from lightning_mixcn.modules import CausalLMModule

# Files that a run may write into its folder, by whichever callback, and with its folders all names that are taken.
RUN_FILES = (
    "config.yaml",
    "config.validate.yaml",
    "config.test.yaml",
    "config.predict.yaml",
    "epochs.json",
    "validate.json",
    "test.json",
    "predictions.jsonl",
    "samples.jsonl",
    "answers.jsonl",
    "benchmarks.jsonl",
    "few_shot.jsonl",
    "experts.csv",
    "facts.json",
)
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
LONG_CONTEXT = "long_context"
FIGURES = "figures"
_RUN_NAMES = {*RUN_FILES, CHECKPOINTS, TENSORBOARD, LONG_CONTEXT, FIGURES}
_MAX_NAME_BYTES = 200  # file systems take 255; the hidden names of unfinished output are longer


def plain_name(argument: str, name: str, own: Collection[str] = ()) -> str:
    """Return the name of a file or folder in the run's folder.

    Args:
        argument: Name of the argument.
        name: Its value.
        own: Names of a run's outputs that are the callback's own.

    Raises:
        ValueError: it is a path, could not be typed or seen, or is the name of another output of the run.
    """
    is_plain = re.fullmatch(r"[^./\\\x00-\x1f\x7f-\x9f][^/\\\x00-\x1f\x7f-\x9f]*", name) and name == name.strip()
    if not is_plain or len(name.encode(errors="surrogatepass")) > _MAX_NAME_BYTES:
        raise UserError(
            f"`{argument}={name[:_MAX_NAME_BYTES]!r}`: expected a plain name in the run's folder, without slashes, a "
            f"dot in front or control characters, of at most {_MAX_NAME_BYTES} bytes. Give e.g. "
            f"{next(iter(own), 'adapter')}"
        )
    if name.casefold() in _RUN_NAMES - {*own}:
        raise UserError(f"`{argument}={name!r}` is what a run calls another of its outputs. Choose another name")
    return name


def causal_lm(callback: Callback, module: LightningModule) -> CausalLMModule:
    """Return the module, if it is one that the callback can work with.

    Args:
        callback: Callback that asks.
        module: The LightningModule that is trained or evaluated.

    Raises:
        ValueError: The module is none of this package's, nor a subclass of one.
    """
    if not isinstance(module, CausalLMModule):
        raise UserError(
            f"{type(callback).__name__} works with a CausalLMModule, but `model` is {type(module).__name__}. "
            "Subclass CausalLMModule, or leave the callback out"
        )
    return module


def log_figures(trainer: Trainer, figures: Mapping[str, Any], step: int) -> None:
    """Give figures to every logger of the run; where one takes none, or there is none, write them as PNG files.

    TensorBoard, W&B, MLflow and Comet take figures. A file is ``figures/<tag, with _ for />_step_<step>.png`` in the
    run's folder. Nothing happens on other ranks than zero.

    Args:
        trainer: Lightning's.
        figures: `matplotlib.figure.Figure` by tag.
        step: Optimizer steps done.
    """
    for tag, figure in figures.items() if trainer.is_global_zero else ():
        if _reaches_all([_show_figure(logger, tag, figure, step) for logger in trainer.loggers]):
            continue
        with new_file(_beside(trainer, f"{tag}_step_{step:08d}.png"), replace=True) as unfinished:
            figure.savefig(unfinished)


def log_texts(trainer: Trainer, texts: Mapping[str, str], step: int) -> None:
    """Give Markdown to every logger of the run; where one takes none, or there is none, write it as files.

    The file ``figures/<tag, with _ for />.md`` has the newest text of its tag. Nothing happens on other ranks than
    zero.

    Args:
        trainer: Lightning's.
        texts: Markdown by tag.
        step: Optimizer steps done.
    """
    for tag, text in texts.items() if trainer.is_global_zero else ():
        if not _reaches_all([show_text(logger, tag, text, step) for logger in trainer.loggers]):
            write_text(_beside(trainer, f"{tag}.md"), f"{text}\n")


def show_text(logger: Logger, tag: str, text: str, step: int) -> bool:
    """Give Markdown to a logger, on rank zero. Return whether it takes texts."""
    experiment: Any = getattr(logger, "experiment", None)
    if isinstance(logger, WandbLogger):
        logger.log_text(tag, columns=["step", "text"], data=[[str(step), text]], step=step)
    elif isinstance(logger, MLFlowLogger):
        experiment.log_text(logger.run_id, text, f"{tag}.md")
    elif isinstance(logger, CometLogger):
        experiment.log_text(text, step=step, metadata={"tag": tag})
    elif add_text := getattr(experiment, "add_text", None):
        add_text(tag, text, step)
    else:
        return False
    return True


def _show_figure(logger: Logger, tag: str, figure: Any, step: int) -> bool:
    experiment: Any = getattr(logger, "experiment", None)
    if isinstance(logger, WandbLogger):
        logger.log_image(tag, [_picture(figure)], step=step)
    elif isinstance(logger, MLFlowLogger):
        experiment.log_figure(logger.run_id, figure, f"{tag}_step_{step:08d}.png")
    elif isinstance(logger, CometLogger):
        experiment.log_figure(figure_name=tag, figure=figure, step=step)
    elif add_figure := getattr(experiment, "add_figure", None):  # TensorBoard's, and whatever writes for it
        add_figure(tag, figure, step)
    else:
        return False
    return True


def _reaches_all(taken: list[bool]) -> bool:
    return bool(taken) and all(taken)


def _beside(trainer: Trainer, name: str) -> Path:
    return Path(trainer.default_root_dir, FIGURES, name.replace("/", "_"))


def _picture(figure: Any) -> Any:
    """Return a figure as one of Pillow's images, which W&B takes."""
    from PIL import Image

    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png)


class StepRecords:
    """JSON Lines in a run's folder, in which every step is there once, however often the run is resumed.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, step: int) -> None:
        """Begin or go on: remove what a resumed run will write again.

        Args:
            step: Optimizer steps done; 0 begins a new file.
        """
        if step == 0:
            self._path.unlink(missing_ok=True)
        elif self._path.exists():
            keep_lines(self._path, lambda line: _step(line) <= step)

    def append(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Add records of a step, a line each."""
        lines = [json.dumps({"step": step, **record}, ensure_ascii=False, default=str) for record in records]
        append_lines(self._path, [f"{line}\n" for line in lines])

    def read(self) -> list[dict[str, Any]]:
        """Return all records, with their ``step``; what a stranger has written is passed over."""
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [json.loads(line) for line in lines if isfinite(_step(line))]


def _step(line: str) -> float:
    """Return the step of a line, or infinity where a stranger has written it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")
