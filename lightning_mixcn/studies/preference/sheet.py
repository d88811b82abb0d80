"""Which two models a judge sees beside each other, on which side, and in which order."""

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from lightning_mixcn.errors import MissingFileError, UserError


class Item(NamedTuple):
    """A question with two answers.

    Args:
        name: Its name in the sheet, which says nothing of the models.
        question: Which question, from 0.
        left: Which model's answer is on the left, from 0.
        right: Which model's is on the right.
    """

    name: str
    question: int
    left: int
    right: int


def lay_out(models: int, questions: int, *, sheet: str, seed: int, questions_per_pair: int | None = None) -> list[Item]:
    """Lay out the items of a sheet: every pair of models, and each model as often on the left as on the right.

    Orders come from hashes, so that they are the same with every release of Python and numpy.

    Args:
        models: How many there are.
        questions: How many there are.
        sheet: Name of the sheet, the beginning of all items' names.
        seed: Of the order, the sides, and the questions that are drawn.
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


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell[:1] and cell[0] in FORMULA_STARTS else cell


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


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem 1rem 6rem; color: #222 }
article { border-top: 1px solid #bbb; padding: 1rem 0 }
h2 { font-size: .8rem; font-weight: normal; color: #666; margin: 0 }
.question { font-weight: 600; margin: .3rem 0 .8rem }
.question, .left, .right { white-space: pre-wrap; overflow-wrap: anywhere }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
.left, .right { background: #f4f4f4; border-radius: .4rem; padding: .7rem }
.left:empty::before, .right:empty::before { content: "(no answer)"; color: #888 }
fieldset { border: 0; padding: .7rem 0 0; display: flex; justify-content: center; gap: 2rem }
footer { position: fixed; inset: auto 0 0; background: #fff; border-top: 1px solid #bbb; padding: .7rem 1rem;
  display: flex; gap: 1.5rem; justify-content: center; align-items: center }
"""

# What is chosen is kept in the browser until it is saved: a page that is closed by mistake loses nothing.
_SCRIPT = """
"use strict";
const sheet = SHEET, columns = COLUMNS, starts = STARTS;
const articles = [...document.querySelectorAll("article")];
const text = (article, name) => article.querySelector("." + name).textContent;
const verdict = (article) => article.querySelector("input:checked")?.value ?? "";
const harmless = (cell) => (cell && starts.includes(cell[0]) ? "'" + cell : cell);
const quoted = (cell) => '"' + cell.replaceAll('"', '""') + '"';
const line = (cells) => cells.map(quoted).join(",") + "\\r\\n";
const row = (article) =>
  [article.id, ...["question", "left", "right"].map((name) => text(article, name)), verdict(article)].map(harmless);
const csv = () => "\\ufeff" + [columns, ...articles.map(row)].map(line).join("");
const judge = document.querySelector("#judge"), progress = document.querySelector("#progress");
let kept = {};
try { kept = JSON.parse(localStorage.getItem(sheet)) ?? {}; } catch { kept = {}; }
function count() {
  progress.textContent = articles.filter(verdict).length + " / " + articles.length;
}
function keep(article) {
  kept[article.id] = verdict(article);
  try { localStorage.setItem(sheet, JSON.stringify(kept)); } catch { /* a browser that keeps nothing */ }
  count();
}
function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
  const name = judge.value.trim().replace(/[^\\p{L}\\p{N}_-]+/gu, "-");
  link.download = (name || sheet) + ".csv";
  link.click();
}
for (const article of articles) {
  for (const input of article.querySelectorAll("input")) {
    input.checked = input.value === kept[article.id];
    input.addEventListener("change", () => keep(article));
  }
}
document.querySelector("#save").addEventListener("click", save);
count();
"""

_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src '{style_hash}'; script-src '{script_hash}'">
<title>{sheet}</title>
<style>{style}</style>
</head>
<body>
<h1>Which answer is better? 哪个回答更好？</h1>
<p>Choose for each question; leave out what you cannot judge. Then save, and send the file back.
请逐题选择，无法判断的可留空；完成后保存，并将文件发回。</p>
{articles}
<footer>
<label>Your name 姓名 <input id="judge" autocomplete="off"></label>
<span id="progress">0 / {count}</span>
<button id="save">Save as CSV 保存</button>
</footer>
<script>{script}</script>
</body>
</html>
"""

_ARTICLE = """<article id="{item}">
<h2>{item}</h2>
<div class="question">{question}</div>
<div class="answers"><div class="left">{left}</div><div class="right">{right}</div></div>
<fieldset>
<label><input type="radio" name="{item}" value="left"> left 左</label>
<label><input type="radio" name="{item}" value="tie"> tie 平</label>
<label><input type="radio" name="{item}" value="right"> right 右</label>
</fieldset>
</article>"""


def sheet_page(sheet: str, rows: Sequence[SheetRow]) -> str:
    """Make the page of a sheet; it loads nothing, and its policy forbids any script but its own.

    Args:
        sheet: Name of the sheet.
        rows: Of `printable` text, which may hold anything else, HTML too.

    Returns:
        The page, to be written as UTF-8. What it saves is the CSV of the same rows, with verdicts.
    """
    script = _SCRIPT
    for name, value in (("SHEET", sheet), ("COLUMNS", COLUMNS), ("STARTS", FORMULA_STARTS)):
        script = script.replace(f" = {name}", f" = {json.dumps(value)}", 1)
    articles = (_ARTICLE.format(**{name: html.escape(text) for name, text in row._asdict().items()}) for row in rows)
    return _PAGE.format(
        sheet=html.escape(sheet), count=len(rows), articles="\n".join(articles), script=script, style=_STYLE,
        script_hash=_hash(script), style_hash=_hash(_STYLE),
    )  # fmt: skip


def _hash(content: str) -> str:
    """What a content security policy calls a script or style by (W3C, CSP 3)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
