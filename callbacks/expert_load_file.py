"""Tokens of each expert as a file, for those who plot on their own."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .finished_output import write_text


class Row(NamedTuple):
    """A line of the file.

    Args:
        step: Optimizer steps done when it was written.
        stage: ``train``, of the steps since the last such line; or ``val``, of one pass.
        source: Name of the source, ``all`` where sources have no names.
        position_from: First position in its document of the bucket of positions.
        layer: From 0.
        expert: From 0.
        tokens: How often it was chosen.
    """

    step: int
    stage: str
    source: str
    position_from: int
    layer: int
    expert: int
    tokens: int


_HEADER = ",".join(Row._fields) + "\n"


class ExpertLoadFile:
    """``experts.csv``, in which every step is there once, however often a run is resumed.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started_at = 0

    def start(self, step: int, logged_at: int) -> None:
        """Begin or go on: remove what a resumed run will write again.

        Args:
            step: Optimizer steps done; 0 begins a new file.
            logged_at: Of these, those whose training lines were written before the checkpoint was.
        """
        self._started_at = step
        self._keep(lambda at, stage: at <= (logged_at if stage == "train" else step) and step > 0)

    def append(self, rows: Iterable[Row]) -> None:
        """Add the lines of one step and stage."""
        lines = list(rows)
        if lines and lines[0].step <= self._started_at:
            # Lightning repeats the validation of the step that a run is resumed from, or not: it depends on where.
            self._keep(lambda at, stage: (at, stage) != lines[0][:2])
        with self._path.open("a", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    def _keep(self, is_kept: Callable[[int, str], bool]) -> None:
        before = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        kept = []
        for line in before[1:]:
            step, stage, _ = line.split(",", 2) if line.count(",") > 1 else ("", "", "")
            # A kill can leave half a line.
            if line.endswith("\n") and step.isdigit() and is_kept(int(step), stage):
                kept.append(line)
        write_text(self._path, _HEADER + "".join(kept))
