"""Rows as CSV."""

import csv
import math
from pathlib import Path

from lightning_mixcn.studies.parts import write_csv


def test_what_is_no_number_is_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"name": "大", "x": 0.1}, {"name": 'say "a,b"', "x": math.nan}])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "大", "x": "0.1"}, {"name": 'say "a,b"', "x": ""}]


def test_no_row_is_an_empty_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_bytes() == b""
