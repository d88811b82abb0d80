"""Pairs of answers of a few bytes, several turns among them, for runs of a tiny model."""

import json
from pathlib import Path
from typing import Any

LONG = "长" * 30  # does not fit beside the other answer in rows of 160 tokens


def pair_records(count: int, *, long_ones: bool = False) -> list[dict[str, Any]]:
    """Return pairs whose chosen answer is a good one, `好`, and whose rejected one is bad, `坏`."""
    records = []
    for number in range(count):
        history = [["早", "好"]] * (number % 3)
        record = {"instruction": f"问{number}", "history": history, "chosen": "好" * (1 + number % 4), "rejected": "坏"}
        if long_ones and number % 5 == 0:
            record["rejected"] = LONG
        records.append(record)
    return records


def verdict_records(count: int) -> list[dict[str, Any]]:
    """Return answers with a verdict, every other one of them good."""
    return [
        {
            "prompt": f"问{number}",
            "completion": ("好" if number % 2 else "坏") * (1 + number % 3),
            "label": number % 2 == 1,
        }
        for number in range(count)
    ]


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    """Write JSON lines; return the path as a source has it."""
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return str(path)
