"""Choose the experts that a training adapts, by figures of a study or by the load that a run wrote.

Adapting only experts that a language uses, in the last layers: arXiv 2605.29714; see also arXiv 2605.18083. Which
experts matter is measured in several ways, see `ChoiceOptions`.

Legend: L layers, E experts.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import new_file
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.masking import without_secrets
from lightning_mixcn.studies.parts import say
from lightning_mixcn.studies.tables import aligned

from .options import ChoiceOptions

Floats = NDArray[np.float64]
MEASURES = ("importance", "saliency", "load", "divergence", "random")
# Columns of a study's experts.csv, by the measure that is read from them as they are.
_COLUMNS = {"importance": "bits_per_byte_change", "saliency": "saliency_over_layer_mean"}
_TABLE, _STUDY = "experts.csv", "experts.json"


class ExpertTable(NamedTuple):
    """Figures of every expert.

    Args:
        tokens: float64 ``[L, E]`` by source, how often each expert was chosen.
        figures: float64 ``[L, E]`` by measure and source, those of `_COLUMNS` that were measured.
        about: Origin of the figures.
    """

    tokens: dict[str, Floats]
    figures: dict[str, dict[str, Floats]]
    about: dict[str, Any]

    @property
    def measures(self) -> list[str]:
        """Return the values of `choose_by` for which there are figures."""
        return [name for name in MEASURES if name in self.figures or name not in _COLUMNS]

    def scores(self, choice: ChoiceOptions) -> tuple[Floats, str, str | None]:
        """Return float64 ``[L, E]``, more being better, the source that they are for and the one it is compared with.

        Raises:
            ValueError: the table does not have what is asked for.
        """
        num_layers, num_experts = next(iter(self.tokens.values())).shape
        source, other = choice.sources(list(self.tokens), num_experts, self.measures)
        if choice.choose_by in self.figures:
            return self.figures[choice.choose_by][source], source, None
        if choice.choose_by == "random":
            return np.random.default_rng(choice.choose_seed).random((num_layers, num_experts)), source, None
        scores_LE = _shares(self.tokens[source])
        return (scores_LE if other is None else scores_LE - _shares(self.tokens[other])), source, other


def write_choice(table: Path, choice: ChoiceOptions, file: Path) -> None:
    """Write a choice of experts as `model.init_args.train_only` reads it, and print what it is.

    Args:
        table: Folder of a study or of a run, or its ``experts.csv``.
        choice: Number of experts, and their measure.
        file: JSON file to make; the same choice may be there.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: it is another table, or does not have what is asked for.
        FileExistsError: another file is there.
    """
    assert choice.choose is not None
    found = read_table(table)
    scores_LE, source, other = found.scores(choice)
    experts = best_experts(scores_LE, choice.choose)
    is_chosen_LE = np.zeros(scores_LE.shape, dtype=bool)
    for layer, numbers in experts.items():
        is_chosen_LE[layer, numbers] = True
    carried = {name: float(_shares(counts_LE, None)[is_chosen_LE].sum()) for name, counts_LE in found.tokens.items()}
    about = found.about | {
        "made_by": "mixcn experts",
        "choose": choice.choose,
        "choose_by": choice.choose_by,
        "choose_for": source,
        "choose_against": other,
        "choose_seed": choice.choose_seed if choice.choose_by == "random" else None,
        "num_layers": scores_LE.shape[0],
        "num_experts": scores_LE.shape[1],
        "chosen_experts": int(is_chosen_LE.sum()),
        "share_of_load": carried,
    }
    content = {
        "layers": list(experts),
        "experts": {str(layer): numbers for layer, numbers in experts.items()},
        "router": True,
        "attention": True,
        "about": {name: value for name, value in about.items() if value is not None},
    }
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):
        with new_file(file) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    print(_summary(experts, found.tokens, about))
    say(f"{file}: give it as model.init_args.train_only")


def best_experts(scores_LE: Floats, number: float) -> dict[int, list[int]]:
    """Return the numbers of the best experts by layer, ascending, of equal ones the first.

    Args:
        scores_LE: More is better.
        number: Experts of each layer; or a share, below 1, of all experts, at least one of them.
    """
    is_best_LE = np.zeros(scores_LE.shape, dtype=bool)
    if number < 1:
        count = max(1, round(number * scores_LE.size))
        is_best_LE.flat[np.argsort(-scores_LE, axis=None, kind="stable")[:count]] = True
    else:
        best_LN = np.argsort(-scores_LE, axis=1, kind="stable")[:, : int(number)]
        np.put_along_axis(is_best_LE, best_LN, True, axis=1)
    return {layer: np.flatnonzero(row).tolist() for layer, row in enumerate(is_best_LE) if row.any()}


def read_table(path: Path) -> ExpertTable:
    """Read what a study or `ExpertLoadMonitor` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another table, or not whole.
    """
    file = path / _TABLE if path.is_dir() else path
    if not file.is_file():
        raise MissingFileError(
            f"`src={str(path)!r}` has no {_TABLE}. Give the folder of a study by `mixcn experts` or of a run with "
            "ExpertLoadMonitor, or `text` to measure a model"
        )
    try:
        columns = next(_lines(file), {}).keys()
        if {"mode", "saliency_over_layer_mean"} <= columns:
            return _study_table(file)
        if {"stage", "step", "source", "tokens"} <= columns:
            return _run_table(file)
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # a UserError is a ValueError
        raise UserError(f"{str(file)!r} is damaged ({error}). Make it again") from error
    raise UserError(
        f"{str(file)!r} is not what `mixcn experts` or ExpertLoadMonitor writes: it has the columns "
        f"{shorten(', '.join(map(str, columns)), 80) or 'of nothing'}. Give the folder of a study or of a run"
    )


def _lines(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        yield from csv.DictReader(opened)


def _study_table(file: Path) -> ExpertTable:
    """Read the figures of one way of disabling experts, masking where there are two."""
    modes = {line["mode"] for line in _lines(file)}
    mode = "mask" if "mask" in modes else min(modes)
    measured = {name: column for name, column in _COLUMNS.items() if mode != "saliency" or name == "saliency"}
    numbers = _numbers((line for line in _lines(file) if line["mode"] == mode), ["tokens", *measured.values()])
    about: dict[str, Any] = {"table": str(file), "mode": mode}
    if (report := file.with_name(_STUDY)).is_file():
        about["study"] = without_secrets(read_object(report)["settings"])
    return ExpertTable(numbers["tokens"], {name: numbers[column] for name, column in measured.items()}, about)


def _run_table(file: Path) -> ExpertTable:
    """Read the last validation, or all of training where there was none."""
    step = max((int(line["step"]) for line in _lines(file) if line["stage"] == "val"), default=None)
    stage = "train" if step is None else "val"
    lines = (line for line in _lines(file) if line["stage"] == stage and (step is None or int(line["step"]) == step))
    about = {"table": str(file), "stage": stage, "step": step}
    return ExpertTable(_numbers(lines, ["tokens"])["tokens"], {}, about)


def _numbers(lines: Iterable[Mapping[str, str]], columns: Sequence[str]) -> dict[str, dict[str, Floats]]:
    """Add up columns of a table for each expert; float64 ``[L, E]`` by column and source."""
    cells: dict[str, dict[str, dict[tuple[int, int], float]]]
    cells = {column: defaultdict(lambda: defaultdict(float)) for column in columns}
    for line in lines:
        place = int(line["layer"]), int(line["expert"])
        for column in columns:
            cells[column][line["source"]][place] += float(line[column])
    places = sorted({place for sources in cells.values() for values in sources.values() for place in values})
    num_layers, num_experts = (1 + max((place[axis] for place in places), default=-1) for axis in (0, 1))
    numbers: dict[str, dict[str, Floats]] = {}
    for column, sources in cells.items():
        for source, values in sources.items():
            if len(values) != num_layers * num_experts or places[0] != (0, 0):
                raise ValueError(f"experts of {source!r} are missing")
            values_LE = np.array([values[place] for place in places]).reshape(num_layers, num_experts)
            if not np.isfinite(values_LE).all():
                raise ValueError(f"{column} of {source!r} is not finite")
            numbers.setdefault(column, {})[source] = values_LE
    if not places:
        raise ValueError("it has no line of an expert")
    return numbers


def _shares(counts_LE: Floats, axis: int | None = 1) -> Floats:
    """Divide by the sum of each layer, or of the model; 0 where nothing was counted."""
    shares_LE: Floats = counts_LE / np.maximum(counts_LE.sum(axis=axis, keepdims=True), 1.0)
    return shares_LE


def _summary(experts: Mapping[int, Sequence[int]], tokens: Mapping[str, Floats], about: Mapping[str, Any]) -> str:
    """Return what a choice is, a line a layer."""
    size, against = about["num_layers"] * about["num_experts"], about["choose_against"]
    carried = ", ".join(f"{share:.1%} of {name}'s" for name, share in about["share_of_load"].items())
    lines = [["layer", "experts", *(f"load of {name}" for name in tokens)]]
    for layer, numbers in experts.items():
        loads = (f"{_shares(counts_LE)[layer, numbers].sum():.1%}" for counts_LE in tokens.values())
        lines.append([str(layer), shorten(" ".join(map(str, numbers)), 40, placeholder=" …"), *loads])
    return (
        f"{about['chosen_experts']} of {size} experts in {len(experts)} of {about['num_layers']} layers, by "
        f"{about['choose_by']} for {about['choose_for']}{f' against {against}' if against else ''}\n"
        f"They are {about['chosen_experts'] / size:.1%} of the experts, and carry of the load: {carried}\n\n"
        f"{aligned(lines, left=(1,))}\n"
    )
