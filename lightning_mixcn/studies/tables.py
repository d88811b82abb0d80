"""Results of a study as tables: CSV to compute with, text and Markdown to read."""

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

# Text that begins so, spreadsheets take for a formula: wide forms in Chinese and Japanese editions, and after blanks
# and characters without a width, which some of them leave out.
FORMULA_STARTS = "=+-@|;；＝＋－＠﹦﹢﹣﹫ \t\n\r\xa0\u3000\u200b\u200c\u200d\u2060\ufeff"


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with the keys of the first one as columns; a number that there is not is an empty field.

    Args:
        rows: Rows with the same keys; NaN and ``None`` are no numbers. Without any, the text is empty.
    """
    text, columns = io.StringIO(), list[str]()
    writer = csv.writer(text, lineterminator="\n")
    for line in rows:  # one at a time: pairs of 128 experts in 48 layers are 780,000
        if not columns:
            columns = list(line)
            writer.writerow(map(_cell, columns))
        writer.writerow([_cell(line[key]) for key in columns])
    return text.getvalue()


def harmless_cell(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would run as a formula, blanks before it or not."""
    return f"'{text}" if text[:1] and text[0] in FORMULA_STARTS else text


def _cell(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return ""
    return harmless_cell(value) if isinstance(value, str) else value


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as `csv_text` has them."""
    path.write_text(csv_text(rows), encoding="utf-8", newline="")


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0, 1)) -> str:
    """Align columns of text to the right, but for some.

    Args:
        lines: Cells; a line may be shorter than the others.
        left: Columns that are aligned to the left, from 0.
    """
    return _tabulate(lines, "plain", left)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose head is the first line and whose names are the first column."""
    return _tabulate(lines[1:], "pipe", (0,), headers=lines[0])


def _tabulate(lines: Sequence[Sequence[str]], form: str, left: Collection[int], headers: Sequence[str] = ()) -> str:
    sides = ["left" if column in left else "right" for column in range(max(map(len, [headers, *lines])))]
    table: str = tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=sides)
    return table
