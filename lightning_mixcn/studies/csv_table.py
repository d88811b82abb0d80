"""Tables of studies as CSV."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_csv(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a table; a number that there is not is an empty field.

    Args:
        path: File to write.
        lines: Rows, all with the same columns; without any, the file is empty.
    """
    rows = list(lines)
    with path.open("w", encoding="utf-8", newline="") as file:
        if not rows:
            return
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            missing = {key: "" for key, value in row.items() if isinstance(value, float) and math.isnan(value)}
            writer.writerow(row | missing)
