"""A sheet as one HTML page: a judge clicks, and the page saves the filled-in CSV on the judge's own machine."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence

from .preference_file import COLUMNS, FORMULA_STARTS, SheetRow

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
