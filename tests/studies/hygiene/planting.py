"""Documents with copies and questions planted in them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_MARKS = "，。！？；：、,.!?;: "


class Planted(NamedTuple):
    """A file of documents, and the lines of those that are to go, by what they are."""

    path: Path
    lines: dict[str, set[int]]


def plant(path: Path, documents: Sequence[str], questions: Sequence[str], seed: int = 0) -> Planted:
    """Write documents, and behind them three copies of every ninth and a question in every other ninth."""
    draw = random.Random(seed)
    written, lines = list(documents), dict[str, set[int]]()
    letters = [character for text in documents[:200] for character in text if character.isalnum()]

    def add(kind: str, text: str) -> None:
        written.append(text)
        lines.setdefault(kind, set()).add(len(written))

    for number, text in enumerate(documents):
        if number % 9 == 0:
            add("exact", text)
            add("punctuation", "".join(draw.choice(_MARKS) if c in _MARKS else c for c in text))
            changed = set(draw.sample(range(len(text)), len(text) // 10))
            add("changed", "".join(draw.choice(letters) if at in changed else c for at, c in enumerate(text)))
    for number, question in enumerate(questions):
        text = "".join(draw.choice(letters) for _ in range(300))
        add("question", f"{text[: number % 200]}\n{question}\n{text[number % 200 :]}")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in written), encoding="utf-8")
    return Planted(path, lines)


def removed(folder: Path) -> dict[int, dict[str, Any]]:
    """Read removed.jsonl, by line."""
    records = map(json.loads, (folder / "removed.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["line"]: record for record in records}


def recall_and_precision(planted: Planted, folder: Path) -> tuple[dict[str, float], float]:
    """Return the share of what was planted that goes, by kind, and the share of what goes that was planted."""
    gone = set(removed(folder))
    everything = set().union(*planted.lines.values())
    recall = {kind: len(lines & gone) / len(lines) for kind, lines in planted.lines.items()}
    return recall, len(gone & everything) / len(gone)
