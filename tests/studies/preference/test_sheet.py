"""The page: read by an HTML parser as a browser reads it, and its script run by node with a stand-in for a browser."""

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest

from lightning_mixcn.studies.preference.sheet import (
    COLUMNS,
    SheetRow,
    Verdict,
    lay_out,
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


NASTY = ["=1+1", "+1", "-1 apples", "@SUM(A1)", "＝1", "\tx", "\nx", '"=1"', 'a,b;c\n"d"', "", "' =x", "你好"]


def test_a_spreadsheet_runs_nothing_and_reads_chinese() -> None:
    content = sheet_csv(SheetRow(f"p-{place}", text, text, text) for place, text in enumerate(NASTY))
    assert content.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert rows[0] == list(COLUMNS)
    for text, row in zip(NASTY, rows[1:], strict=True):
        escaped = f"'{text}" if text[:1] in tuple("=+-@＝\t\n") else text
        assert row[1:] == [escaped] * 3 + [""]
        assert not any(cell.startswith(tuple("=+-@＝＋－＠\t\r\n")) for cell in row)


def test_control_characters_are_shown_as_broken() -> None:
    assert printable("a\x00b\x1bc\td\r\ne\rf") == "a\ufffdb\ufffdc\td\ne\nf"


SAVED = {
    "as it was": '\ufeff"item","question","verdict"\r\n"p-1","a\nb","left"\r\n"p-2","x",""\r\n',
    "german": "item;question;verdict\n p-1 ;a,b;LEFT \np-2;x;\n;;\n\n",
    "tabs": "Verdict\tItem\nleft\tp-1\n\tp-2\n",
    "chinese": 'item,question,verdict\np-1,"a\nb",左\np-2,x,\n',
}


@pytest.mark.parametrize("content", SAVED.values(), ids=SAVED)
def test_sheets_as_programs_save_them(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content.encode())
    assert read_sheet(file) == [Verdict(2, "p-1", "left"), Verdict(3, "p-2", "")]


def test_every_word(tmp_path: Path) -> None:
    words = ["left", "right", "tie", "左", "右", "平", "Tie"]
    lines = (f"p-{place},{word}\n" for place, word in enumerate(words))
    (tmp_path / "a.csv").write_text("item,verdict\n" + "".join(lines), encoding="utf-8")
    expected = ["left", "right", "tie", "left", "right", "tie", "tie"]
    assert [found.verdict for found in read_sheet(tmp_path / "a.csv")] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "item,verdict\np-1,left\np-2,both\n",
            "row 3: the verdict 'both' is not known. Expected one of left, right, tie",
        ),
        ("item,verdict\np-1,left\np-1,left\n", "rows 2 and 3 are both of item 'p-1'"),
        ("item,verdict\n\np-1\n", "row 3 has 1 cells, the header 2"),
        ("item,answer\np-1,left\n", "row 1: expected one column 'verdict', got 'item, answer'"),
        ("", "row 1: expected one column 'item'"),
        ('item,verdict\n"p-1,left\n', "is no CSV"),
        ("item,verdict\np-1,左\n".encode("gbk"), 'is not UTF-8. Save it as "CSV UTF-8"'),
    ],
)
def test_what_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "judge.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"judge\.csv") as error:
        read_sheet(file)
    assert message in str(error.value)


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_sheet("nowhere.csv")


@pytest.mark.parametrize(("models", "questions"), [(2, 1), (2, 7), (4, 10)])
def test_every_pair_gets_every_question_once(models: int, questions: int) -> None:
    items = lay_out(models, questions, sheet="p1", seed=0)
    found = Counter((item.question, *sorted(item[2:])) for item in items)
    assert found == Counter((q, *pair) for q in range(questions) for pair in combinations(range(models), 2))
    assert len({item.name for item in items}) == len(items)


def test_each_model_is_as_often_on_either_side() -> None:
    items = lay_out(3, 20, sheet="p1", seed=3)
    for pair in combinations(range(3), 2):
        sides = Counter(item[2:] for item in items if set(item[2:]) == set(pair))
        assert sides == {pair: 10, pair[::-1]: 10}


def test_order_and_sides_are_the_seed_s() -> None:
    one, again, other = (lay_out(3, 20, sheet="p1", seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert [item[1:] for item in one] != [item[1:] for item in other]
    assert one[0].name == "p1-01"
    # Neither the pair nor the question can be told from the place.
    assert [item.question for item in one] != sorted(item.question for item in one)
    assert len({tuple(sorted(item[2:])) for item in one[:20]}) == 3


def test_order_is_the_same_everywhere() -> None:
    """Golden: a key that somebody has kept still fits the sheet that the same seed makes."""
    assert [tuple(item) for item in lay_out(2, 3, sheet="p", seed=7)] == [
        ("p-1", 2, 1, 0),
        ("p-2", 1, 0, 1),
        ("p-3", 0, 0, 1),
    ]


def test_questions_are_drawn_for_each_pair() -> None:
    items = lay_out(3, 50, sheet="p", seed=0, questions_per_pair=4)
    assert Counter(tuple(sorted(item[2:])) for item in items) == dict.fromkeys(combinations(range(3), 2), 4)
    drawn = [{item.question for item in items if set(item[2:]) == set(pair)} for pair in combinations(range(3), 2)]
    assert drawn[0] != drawn[1]
    assert len(lay_out(2, 3, sheet="p", seed=0, questions_per_pair=4)) == 3
