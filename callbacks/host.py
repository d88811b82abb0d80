"""What callbacks have in common: a module that is checked, names of files that are checked, records of steps."""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import append_lines, keep_lines
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
_RUN_NAMES = {*RUN_FILES, CHECKPOINTS, TENSORBOARD, LONG_CONTEXT}
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


def _step(line: str) -> float:
    """Return the step of a line, or infinity where a stranger has written it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")
