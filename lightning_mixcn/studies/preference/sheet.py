"""Which two models a judge sees beside each other, on which side, and in which order."""

import base64
import csv
import hashlib
import io
import math
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.studies.tables import FORMULA_STARTS, harmless_cell


class Item(NamedTuple):
    """A question with two answers.

    Args:
        name: Its name in the sheet, which says nothing of the models.
        question: Number of the question, from 0.
        left: Number of the model whose answer is on the left, from 0.
        right: Number of the model on the right.
    """

    name: str
    question: int
    left: int
    right: int


def lay_out(models: int, questions: int, *, sheet: str, seed: int, questions_per_pair: int | None = None) -> list[Item]:
    """Lay out the items of a sheet: every pair of models, and each model as often on the left as on the right.

    Orders come from hashes, so that they are the same with every release of Python and numpy.

    Args:
        models: Number of models.
        questions: Number of questions.
        sheet: Name of the sheet, the beginning of all items' names.
        seed: Seed of the order, the sides, and the questions that are drawn.
        questions_per_pair: Draw this many questions for each pair; ``None`` takes all.

    Returns:
        The items in the order of the sheet.
    """
    chosen: list[tuple[int, int, int]] = []
    for pair in combinations(range(models), 2):
        drawn = sorted(range(questions), key=lambda question: _digest(seed, "side", *pair, question))
        for place, question in enumerate(drawn[:questions_per_pair]):
            chosen.append((question, *(pair if place % 2 == 0 else pair[::-1])))
    chosen.sort(key=lambda item: _digest(seed, "order", *item))
    width = 1 + int(math.log10(len(chosen)))
    return [Item(f"{sheet}-{number:0{width}}", *item) for number, item in enumerate(chosen, 1)]


def _digest(*what: int | str) -> bytes:
    return hashlib.sha256(" ".join(map(str, what)).encode()).digest()


COLUMNS = ("item", "question", "left", "right", "verdict")
# What a judge may write, and what it means.
VERDICTS = {"left": "left", "right": "right", "tie": "tie", "左": "left", "右": "right", "平": "tie"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Of one cell, more than any answer has.
_MOST_CHARACTERS = 10_000_000


class SheetRow(NamedTuple):
    """What a judge sees of an item.

    Args:
        item: Its name.
        question: The question.
        left: One answer.
        right: The other.
    """

    item: str
    question: str
    left: str
    right: str


class Verdict(NamedTuple):
    """What a judge says of an item.

    Args:
        row: As a spreadsheet counts it, the header being row 1.
        item: The item's name.
        verdict: ``left``, ``right``, ``tie``, or empty where the judge says nothing.
    """

    row: int
    item: str
    verdict: str


def printable(text: str) -> str:
    """Return text without control characters, which neither CSV nor HTML carries, and with plain line ends."""
    return _CONTROL.sub(_BROKEN, text.replace("\r\n", "\n").replace("\r", "\n"))


def sheet_csv(rows: Iterable[SheetRow]) -> bytes:
    """Write a sheet with empty verdicts: UTF-8 with a byte order mark, by which spreadsheets know it.

    Args:
        rows: Rows of `printable` text. A cell that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([*map(harmless_cell, row), ""] for row in rows)
    return text.getvalue().encode("utf-8-sig")


def read_sheet(path: str | Path) -> list[Verdict]:
    """Read a filled-in sheet.

    Args:
        path: CSV in UTF-8, separated by commas, semicolons or tabs, with at least the columns ``item`` and ``verdict``,
            in any order. Empty rows are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8, lacks a column, names an item twice, or has a word that is no verdict; file, row
            and the accepted words are named.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingFileError(f"the sheet {str(path)!r} is no file. Give filled-in sheets, CSV")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeError as error:
        raise UserError(f'the sheet {str(path)!r} is not UTF-8. Save it as "CSV UTF-8"') from error
    cells = _cells(text, str(path))
    header = [name.strip().lower() for name in cells[0]] if cells else []
    if missing := [name for name in ("item", "verdict") if header.count(name) != 1]:
        raise UserError(f"the sheet {str(path)!r} row 1: expected one column {missing[0]!r}, got {', '.join(header)!r}")
    item_column, verdict_column = header.index("item"), header.index("verdict")
    found: dict[str, Verdict] = {}
    for row, values in enumerate(cells[1:], 2):
        if not any(value.strip() for value in values):
            continue
        if len(values) <= max(item_column, verdict_column):
            raise UserError(f"the sheet {str(path)!r} row {row} has {len(values)} cells, the header {len(header)}")
        item = values[item_column].strip()
        if item in found:
            raise UserError(f"the sheet {str(path)!r} rows {found[item].row} and {row} are both of item {item!r}")
        found[item] = Verdict(row, item, _meaning(values[verdict_column], str(path), row))
    return list(found.values())


def _cells(text: str, path: str) -> list[list[str]]:
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    csv.field_size_limit(_MOST_CHARACTERS)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise UserError(f'the sheet {path!r} is no CSV ({error}). Save it again as "CSV UTF-8"') from error


def _meaning(written: str, path: str, row: int) -> str:
    word = written.strip().lower()
    if word and word not in VERDICTS:
        raise UserError(
            f"the sheet {path!r} row {row}: the verdict {written!r} is not known. Expected one of "
            f"{', '.join(VERDICTS)}, or nothing where there is none"
        )
    return VERDICTS.get(word, "")


def sheet_page(sheet: str, rows: Sequence[SheetRow]) -> str:
    """Make the page of a sheet; it loads nothing, and its policy forbids any script but its own.

    Args:
        sheet: Name of the sheet.
        rows: Rows of `printable` text, which may hold anything else, HTML too.

    Returns:
        The page, to be written as UTF-8. What it saves is the CSV of the same rows, with verdicts.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["csp_hash"] = _csp_hash
    template = (files(__package__) / "sheet.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(sheet=sheet, rows=rows, columns=COLUMNS, starts=FORMULA_STARTS)


def _csp_hash(content: str) -> str:
    """Return a content security policy's name of a script or style (W3C, CSP 3)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
