"""The page: read by an HTML parser as a browser reads it, and its script run by node with a stand-in for a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_mixcn.studies.preference.sheet import (
    SheetRow,
    printable,
    read_sheet,
    sheet_csv,
    sheet_page,
)

TEXTS = [
    "</div><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=1+1",
    'say "hi", &amp; 你好\n\n  two  blanks \n',
    "",
    "'; </article> -->",
    "＝1",
    "{sheet} $& \\n",
]
ROWS = [SheetRow(f"p-{place}", *map(printable, (text, text[::-1], text))) for place, text in enumerate(TEXTS)]

# Just enough of a browser: elements that have text, radio buttons, a place that keeps things, and a download.
BROWSER = """
const page = JSON.parse(require("fs").readFileSync(0));
const stored = { ...page.stored }, saved = {}, handlers = {};
const articles = page.articles.map((article) => {
  const button = (value) =>
    ({ value, checked: false, addEventListener: (_, f) => (handlers[article.id + value] = f) });
  const inputs = ["left", "tie", "right"].map(button), checked = () => inputs.find((i) => i.checked) ?? null;
  return {
    id: article.id, inputs,
    querySelector: (q) => q === "input:checked" ? checked() : { textContent: article[q.slice(1)] },
    querySelectorAll: () => inputs,
  };
});
const button = { addEventListener: (_, f) => (handlers.save = f) };
const named = { "#judge": { value: page.judge }, "#progress": {}, "#save": button };
globalThis.document = {
  querySelectorAll: () => articles, querySelector: (q) => named[q],
  createElement: () => ({ click() { saved.name = this.download; saved.content = this.href; } }),
};
globalThis.localStorage = { getItem: (k) => stored[k] ?? null, setItem: (k, v) => (stored[k] = v) };
globalThis.Blob = class { constructor(parts) { this.parts = parts; } };
URL.createObjectURL = (blob) => blob.parts.join("");
(0, eval)(page.script);
for (const [id, value] of Object.entries(page.clicks)) {
  for (const input of articles.find((a) => a.id === id).inputs) input.checked = input.value === value;
  handlers[id + value]();
}
handlers.save();
console.log(JSON.stringify({ saved, stored, progress: named["#progress"].textContent }));
"""


class Reader(HTMLParser):
    """Tags, and the text of each article's parts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.articles: list[dict[str, str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._part: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._part = None
        if tag == "article":
            self.articles.append({"id": str(found["id"])})
        elif tag == "div" and found["class"] != "answers":
            self._part = str(found["class"])
            self.articles[-1][self._part] = ""
        elif tag in ("script", "style"):
            self._part = tag

    def handle_endtag(self, tag: str) -> None:
        self._part = None

    def handle_data(self, data: str) -> None:
        if self._part in ("script", "style"):
            (self.scripts if self._part == "script" else self.styles).append(data)
        elif self._part:
            self.articles[-1][self._part] += data


@pytest.fixture(scope="module")
def page() -> Reader:
    return Reader(sheet_page("p123abc", ROWS))


def test_texts_are_shown_as_they_are(page: Reader) -> None:
    shown = [SheetRow(part["id"], part["question"], part["left"], part["right"]) for part in page.articles]
    assert shown == ROWS


def test_nothing_of_a_text_is_a_tag(page: Reader) -> None:
    kinds = {tag for tag, _ in page.tags}
    assert kinds == {
        "html", "head", "meta", "title", "style", "body", "h1", "p", "article", "h2", "div", "fieldset", "label",
        "input", "footer", "span", "button", "script",
    }  # fmt: skip
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "action")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_policy_allows_this_script_and_style_only(page: Reader) -> None:
    (policy,) = (found["content"] for tag, found in page.tags if tag == "meta" and "http-equiv" in found)

    def name(content: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    (script,), (style,) = page.scripts, page.styles
    assert policy == f"default-src 'none'; style-src {name(style)}; script-src {name(script)}"
    assert not re.search(r"https?://|@import|url\(", script + style)


def run(page: Reader, **changes: object) -> dict[str, object]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs the page's script here, is not installed")
    given = {"articles": page.articles, "script": page.scripts[0], "judge": "", "clicks": {}, "stored": {}} | changes
    done = subprocess.run(
        [node, "-e", BROWSER], input=json.dumps(given), capture_output=True, text=True, check=True, encoding="utf-8"
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_what_it_saves_is_the_sheet(page: Reader, tmp_path: Path) -> None:
    """Unfilled, byte for byte sheet.csv."""
    found = run(page)
    assert found["progress"] == f"0 / {len(ROWS)}"
    assert found["saved"] == {"name": "p123abc.csv", "content": sheet_csv(ROWS).decode("utf-8")}


def test_clicks_are_verdicts(page: Reader, tmp_path: Path) -> None:
    clicks = {"p-0": "left", "p-3": "tie", "p-4": "right"}
    found = run(page, clicks=clicks, judge=" 王 小明/1 ")
    saved = found["saved"]
    assert isinstance(saved, dict)
    assert saved["name"] == "王-小明-1.csv"
    (tmp_path / "a.csv").write_text(saved["content"], encoding="utf-8", newline="")
    assert {verdict.item: verdict.verdict for verdict in read_sheet(tmp_path / "a.csv") if verdict.verdict} == clicks
    assert found["progress"] == f"3 / {len(ROWS)}"
    again = run(page, stored=found["stored"], clicks={"p-4": "left"})
    assert again["progress"] == f"3 / {len(ROWS)}"
    kept = again["saved"]
    assert isinstance(kept, dict)
    assert kept["content"] == saved["content"][::-1].replace('"thgir"', '"tfel"', 1)[::-1]
