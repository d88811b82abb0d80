"""A sheet as CSV: written so that spreadsheets read Chinese and run nothing, and read back as they save it."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("item", "question", "left", "right", "verdict")
# What a judge may write, and what it means.
VERDICTS = {"left": "left", "right": "right", "tie": "tie", "左": "left", "右": "right", "平": "tie"}
# Text that begins so, spreadsheets take for a formula; the wide forms in Chinese and Japanese editions.
FORMULA_STARTS = "=+-@＝＋－＠\t\n"
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
    """Text without control characters, which neither CSV nor HTML carries, and with plain line ends."""
    return _CONTROL.sub(_BROKEN, text.replace("\r\n", "\n").replace("\r", "\n"))


def sheet_csv(rows: Iterable[SheetRow]) -> bytes:
    """Write a sheet with empty verdicts: UTF-8 with a byte order mark, by which spreadsheets know it.

    Args:
        rows: Of `printable` text. A cell that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([*map(_harmless, row), ""] for row in rows)
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
        raise FileNotFoundError(f"the sheet {str(path)!r} is no file. Give filled-in sheets, CSV")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f'the sheet {str(path)!r} is not UTF-8. Save it as "CSV UTF-8"') from error
    cells = _cells(text, str(path))
    header = [name.strip().lower() for name in cells[0]] if cells else []
    if missing := [name for name in ("item", "verdict") if header.count(name) != 1]:
        raise ValueError(
            f"the sheet {str(path)!r} row 1: expected one column {missing[0]!r}, got {', '.join(header)!r}"
        )
    item_column, verdict_column = header.index("item"), header.index("verdict")
    found: dict[str, Verdict] = {}
    for row, values in enumerate(cells[1:], 2):
        if not any(value.strip() for value in values):
            continue
        if len(values) <= max(item_column, verdict_column):
            raise ValueError(f"the sheet {str(path)!r} row {row} has {len(values)} cells, the header {len(header)}")
        item = values[item_column].strip()
        if item in found:
            raise ValueError(f"the sheet {str(path)!r} rows {found[item].row} and {row} are both of item {item!r}")
        found[item] = Verdict(row, item, _meaning(values[verdict_column], str(path), row))
    return list(found.values())


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell[:1] and cell[0] in FORMULA_STARTS else cell


def _cells(text: str, path: str) -> list[list[str]]:
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    csv.field_size_limit(_MOST_CHARACTERS)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(f'the sheet {path!r} is no CSV ({error}). Save it again as "CSV UTF-8"') from error


def _meaning(written: str, path: str, row: int) -> str:
    word = written.strip().lower()
    if word and word not in VERDICTS:
        raise ValueError(
            f"the sheet {path!r} row {row}: the verdict {written!r} is not known. Expected one of "
            f"{', '.join(VERDICTS)}, or nothing where there is none"
        )
    return VERDICTS.get(word, "")
