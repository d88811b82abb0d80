"""Texts as the JSONL files of a source."""

import json
from pathlib import Path

from lightning_mixcn.text import Source


def write(folder: Path, texts: list[str], name: str = "zh", files: int = 3) -> Source:
    for index in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[index::files])
        (folder / f"{name}{index}.jsonl").write_text("".join(lines))
    return Source(name, f"{folder}/{name}*.jsonl")
