"""Tables of a study as CSV."""

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with the keys of the first one as columns; a number that there is not is an empty field.

    Args:
        path: File to write, empty where there is no row.
        rows: Alike; NaN and ``None`` are no numbers.
    """
    lines = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        if not lines:
            return
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            missing = {key: "" for key, value in line.items() if isinstance(value, float) and math.isnan(value)}
            writer.writerow({**line, **missing})
