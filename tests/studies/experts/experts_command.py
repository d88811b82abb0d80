"""A small study by `mixcn experts`: its command line, and its tables read back."""

import csv
from pathlib import Path

Lines = list[dict[str, str]]


def arguments(src: Path, out: Path, files: list[Path], *more: str) -> list[str]:
    text = [f"{file.stem}={file}" for file in files]
    return [
        *("experts", str(src), "--out", str(out), "--text", *text, "--device=cpu", "--dtype=float32"),
        *("--sequence_length=48", "--max_tokens=150", "--micro_batch_size=2", "--mode=both", *more),
    ]


def lines_of(file: Path) -> Lines:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))
