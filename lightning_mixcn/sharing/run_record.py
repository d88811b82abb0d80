"""What a run's folder says of the run, finished or not: settings, curves, evaluations and records of steps."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from lightning_mixcn.callbacks.defaults import ENVIRONMENT
from lightning_mixcn.callbacks.expert_load.report import ExpertLoadRow
from lightning_mixcn.callbacks.host import TENSORBOARD
from lightning_mixcn.cli.run_folder import CONFIG, holds_run
from lightning_mixcn.errors import MissingFileError, NotAFolderError, UserError
from lightning_mixcn.files.configuration import read_configuration
from lightning_mixcn.files.hub import public_name
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import MAPPING, TEXT, mapping_of, record
from lightning_mixcn.masking import without_secrets

_EVENTS = "events.out.tfevents.*"
_TRAINED, _SPEED = "train/nll_nats_per_token", "throughput/tokens_per_second"
_COPY = "Delete it, or write it again"

Series = dict[int, float]  # optimizer steps done → value


@dataclass(frozen=True)
class Start:
    """One process of a run: the first, or one that resumed it.

    Args:
        began: When its first event was written.
        seconds: From its first event to its last.
        first_step: Optimizer steps done after its first step.
        environment: Command and versions, as `RunLogger` writes them; empty for runs of older versions.
    """

    began: datetime
    seconds: float
    first_step: int
    environment: Mapping[str, str]


@dataclass(frozen=True)
class HeldOut:
    """Likelihoods of held-out text.

    Args:
        name: Where they are from.
        step: Optimizer steps of the adapter.
        sources: ``bits_per_byte`` and other figures by source.
        model: Base, quantization, and adapter that training began from; ``None`` of the run itself.
    """

    name: str
    step: int
    sources: Mapping[str, Mapping[str, Any]]
    model: tuple[str, str, str] | None = None


class ExpertLoads(NamedTuple):
    """Tokens of each expert, by source.

    Args:
        step: Optimizer steps done.
        counts: int64 ``[L, E]`` by source.
    """

    step: int
    counts: Mapping[str, Tensor]


@dataclass
class RunRecord:
    """A run, as its folder has it.

    Args:
        root: The folder.
        settings: Its ``config.yaml``, secrets masked; of a run from Python ``model.init_args`` alone.
        config: Text of ``config.yaml``; empty where there is none.
    """

    root: Path
    settings: Mapping[str, Any]
    config: str
    scalars: dict[str, Series] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimizer steps done, as far as they were logged."""
        return max(self.scalars.get(_TRAINED, {0: 0.0}))

    def section(self, name: str) -> Mapping[str, Any]:
        """Return the arguments of ``model`` or ``data``, or the settings of ``trainer``."""
        part = self.settings.get(name)
        part = part if isinstance(part, Mapping) else {}
        inner = part.get("init_args", {}) if "class_path" in part or name != "trainer" else part
        return inner if isinstance(inner, Mapping) else {}

    def class_name(self, name: str) -> str:
        """Return the class of ``model`` or ``data``, without its package; empty if it is not known."""
        part = self.settings.get(name)
        return str(part.get("class_path", "")).rpartition(".")[2] if isinstance(part, Mapping) else ""

    def tagged(self, prefix: str, suffix: str = "") -> dict[str, Series]:
        """Return the curves of tags with this beginning and end, by what is between."""
        return {
            tag[len(prefix) : len(tag) - len(suffix)]: series
            for tag, series in self.scalars.items()
            if tag.startswith(prefix) and tag.endswith(suffix) and len(tag) >= len(prefix) + len(suffix)
        }

    def last(self, tag: str) -> float | None:
        """Return a curve's last value; ``None`` where there is none."""
        series = self.scalars.get(tag)
        return series[max(series)] if series else None

    def records(self, name: str) -> list[dict[str, Any]]:
        """Read JSON Lines with a step each; half a line, which a kill leaves, is passed over."""
        return [entry for entry in _json_lines(self.root / name) if isinstance(entry.get("step"), int)]

    def json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the folder; ``None`` where there is none. Raises: ValueError: it is damaged."""
        path = self.root / name
        return read_object(path, remedy=_COPY) if path.is_file() else None

    def evaluations(self) -> list[HeldOut]:
        """Return what `mixcn validate` wrote into the folder and into folders in it. Raises: ValueError."""
        paths = [*sorted(self.root.glob("*/validate.json")), self.root / "validate.json"]
        return [_held_out(self.root, path) for path in paths if path.is_file()]

    def own_model(self) -> tuple[str, str, str]:
        """Return base, quantization, and adapter that training began from."""
        return _model(self.section("model"))


def read_run(root: Path) -> RunRecord:
    """Read a run's folder.

    Args:
        root: Folder of the run.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds no run, or its ``config.yaml`` is damaged.
    """
    if not root.exists():
        raise MissingFileError(f"`run={str(root)!r}` is not there. Give the folder of a run, such as runs/demo")
    if not root.is_dir():
        raise NotAFolderError(f"`run={str(root)!r}` is a file. Give the folder of a run, such as runs/demo")
    files = sorted((root / TENSORBOARD).glob(_EVENTS))
    if not (holds_run(root) or files):
        raise UserError(
            f"`run={str(root)!r}` holds no run: neither {CONFIG} nor checkpoints/, adapter/ or {TENSORBOARD}/. Give "
            "the folder that `mixcn fit` wrote, its `trainer.default_root_dir`"
        )
    found = RunRecord(root, *_settings(root))
    for file in files:
        _add_events(found, file)
    return found


def _settings(root: Path) -> tuple[Mapping[str, Any], str]:
    """Return the settings of a run and the text that has them; of a run from Python, the module's arguments."""
    for path, place in ((root / CONFIG, None), (root / TENSORBOARD / "hparams.yaml", "init_args")):
        if path.is_file():
            text = read_configuration(path, str(path))
            try:
                found = yaml.safe_load(text)
            except yaml.YAMLError:  # of a run from Python, whose arguments may be objects
                continue
            settings = without_secrets(found if isinstance(found, Mapping) else {})
            return (settings, text) if place is None else ({"model": {place: settings}}, "")
    return {}, ""


def _add_events(found: RunRecord, file: Path) -> None:
    """Add a process's events; what was logged before of the steps that it took again is forgotten."""
    # Takes a second.
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
        EventAccumulator,
    )

    events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 10, "images": 1}).Reload()
    tags = events.Tags()
    if _TRAINED not in tags["scalars"]:  # of `mixcn validate`, or killed before its first step
        return
    logged = {tag: events.Scalars(tag) for tag in tags["scalars"]}
    # Lightning 2.6 counts one too many once a run that had come to its end is extended: no step is left out otherwise.
    extra = int(bool(found.starts) and logged[_TRAINED][0].step == found.steps + 1)
    curves = {tag: {each.step + _offset(tag, extra): each.value for each in values} for tag, values in logged.items()}
    first = min(curves[_TRAINED])
    for series in found.scalars.values():
        for step in [step for step in series if step >= first]:
            del series[step]
    for tag, series in curves.items():
        found.scalars.setdefault(tag, {}).update(series)
    began, ended = events.FirstEventTimestamp(), max(values[-1].wall_time for values in logged.values())
    environment = {}
    for tag in (each for each in tags["tensors"] if each.startswith(ENVIRONMENT)):
        environment = _parsed(events.Tensors(tag)[-1].tensor_proto.string_val[0].decode(errors="replace"))
    found.starts.append(Start(datetime.fromtimestamp(began, UTC), ended - began, first, environment))


def _offset(tag: str, extra: int) -> int:
    """Return what makes a tag's step the number of optimizer steps done.

    Args:
        tag: The tag.
        extra: By how much Lightning's own count is too high.
    """
    if tag.startswith(("answers/", "benchmarks/", "long_context/", "val/few_shot/")):
        return 0  # logged between steps, by the steps done
    is_counted = tag.startswith(("train/", "val/", "val_average/", "lr-", "data/")) or tag == _SPEED
    return 1 - extra if is_counted else 1  # Lightning numbers steps from 0 in its logs


def _parsed(text: str) -> dict[str, str]:
    """Read the lines that `RunLogger` writes, ``name: value`` each."""
    pairs = (line.strip().partition(": ") for line in text.splitlines() if line.strip())
    return {name: value for name, _, value in pairs}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                yield found


def _held_out(root: Path, path: Path) -> HeldOut:
    found = read_object(path, record({"sources": mapping_of(TEXT, MAPPING)}), remedy=_COPY)
    steps = found.get("steps_trained")
    name = "" if path.parent == root else path.parent.name
    return HeldOut(name, steps if isinstance(steps, int) else 0, found["sources"], _model(found))


def _model(arguments: Mapping[str, Any]) -> tuple[str, str, str]:
    base, quantization, adapter = (str(arguments.get(name) or "") for name in ("base", "quantization", "adapter"))
    return model_name(base), quantization, model_name(adapter)


def model_name(path: str) -> str:
    """Name a model without the path to it, wherever it is now: a hub id as it is, of a folder the last part.

    >>> model_name("data/models/base-nf4"), model_name("mistralai/Mixtral-8x7B-v0.1")
    ('base-nf4', 'mistralai/Mixtral-8x7B-v0.1')
    """
    parts = Path(path).parts
    return Path(path).name if len(parts) != 2 or parts[0] in (".", "..", "/", "~") else public_name(path)


def read_expert_loads(path: Path) -> dict[str, ExpertLoads]:
    """Read the last counts of each stage from ``experts.csv``.

    Args:
        path: The file.

    Returns:
        By stage, ``train``, ``val`` and ``base``; empty where there is no file.
    """
    kept: dict[str, tuple[int, list[ExpertLoadRow]]] = {}
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as lines:
            for cells in csv.reader(lines):
                if (row := _load_row(cells)) is None:
                    continue
                step, rows = kept.get(row.stage, (-1, []))
                if row.step > step:
                    step, rows = row.step, []
                if row.step == step:
                    rows.append(row)
                kept[row.stage] = step, rows
    return {stage: ExpertLoads(step, _counts(rows)) for stage, (step, rows) in kept.items()}


def _load_row(cells: list[str]) -> ExpertLoadRow | None:
    """Return a line of the file; ``None`` for its head, and for half a line."""
    if len(cells) != len(ExpertLoadRow._fields):
        return None
    step, stage, source, *numbers = cells
    if not all(number.isascii() and number.isdigit() for number in (step, *numbers)):
        return None
    return ExpertLoadRow(int(step), stage, source, *map(int, numbers))


_MOST_LAYERS, _MOST_EXPERTS = 1024, 4096  # of a file that is damaged, a table could take all memory


def _counts(rows: list[ExpertLoadRow]) -> dict[str, Tensor]:
    rows = [row for row in rows if row.layer < _MOST_LAYERS and row.expert < _MOST_EXPERTS]
    sizes = max(row.layer for row in rows) + 1, max(row.expert for row in rows) + 1
    counts = {row.source: torch.zeros(sizes, dtype=torch.int64) for row in rows}
    for row in rows:
        counts[row.source][row.layer, row.expert] += row.tokens
    return counts
