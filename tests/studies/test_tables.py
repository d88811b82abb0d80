"""Tables of studies: what is no number is empty, columns line up."""

import csv
import io
import math
from pathlib import Path

import pytest

from lightning_mixcn.studies.tables import aligned, csv_text, markdown_table, write_csv


def test_what_is_no_number_is_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"name": "大", "x": 0.1}, {"name": 'say "a,b"', "x": math.nan}])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "大", "x": "0.1"}, {"name": 'say "a,b"', "x": ""}]


def test_no_row_is_an_empty_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_bytes() == b""


def test_text_is_aligned_and_ends_without_blanks() -> None:
    lines = [["task", "metric", "n", "score"], ["[zh]"], ["mmlu", "acc", "100", "0.5000"], ["c", "f1", "7", "-"]]
    assert aligned(lines).split("\n") == [
        "task  metric    n   score",
        "[zh]",
        "mmlu  acc     100  0.5000",
        "c     f1        7       -",
    ]
    assert aligned([["a", "b"], ["1", "1.50"]], left=()).split("\n") == ["a     b", "1  1.50"]


def test_a_markdown_table_keeps_its_figures_as_they_are_written() -> None:
    assert markdown_table([["arm", "tokens"], ["a", "1,000"], ["long", "0.10"]]).split("\n") == [
        "| arm   |   tokens |",
        "|:------|---------:|",
        "| a     |    1,000 |",
        "| long  |     0.10 |",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(1)",
        "|calc",
        " =1",
        "\t=1",
        "\xa0=1",
        "\u3000=1",
        "\ufeff=1",
        "\u200b=1",
        "；=1",
    ],
)
def test_no_cell_is_a_formula(text: str) -> None:
    rows = list(csv.reader(io.StringIO(csv_text([{text: text, "x": -0.5}]))))
    assert rows == [[f"'{text}", "x"], [f"'{text}", "-0.5"]]
