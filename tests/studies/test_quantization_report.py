"""Known figures as files."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_mixcn.studies.quantization.report import FormatResult, SourceSums, markdown, save_figure, write_report
from lightning_mixcn.studies.quantization.weights import Sizes


def known() -> list[FormatResult]:
    found = []
    for name, of, size, worse in (("bfloat16", "memory", 2000, 0.0), ("nf4-double", "memory", 600, 4.0)):
        sizes = Sizes(size, 1000, size - 100, 900)
        sources = {
            "zh": SourceSums(np.array([50.0, 60.0]) + worse, np.array([100, 100])),
            "en": SourceSums(np.array([70.0]) + worse, np.array([100])),
        }
        found.append(FormatResult(name, size, of, sizes, worse / 40, sources))
    return found


def test_files(tmp_path: Path) -> None:
    table = write_report(tmp_path, {"src": "x"}, known())
    report: dict[str, Any] = json.loads((tmp_path / "quantization.json").read_text(encoding="utf-8"))
    assert report["settings"] == {"src": "x"}
    with (tmp_path / "quantization.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["format"], line["source"]) for line in lines] == [
        (name, source) for name in ("bfloat16", "nf4-double") for source in ("zh", "en")
    ]
    assert float(lines[2]["bits_per_byte"]) == report["formats"][1]["sources"]["zh"]["bits_per_byte"]
    assert lines[3]["standard_error"] == ""
    assert (tmp_path / "quantization.md").read_text(encoding="utf-8") == table
    assert imread(tmp_path / "quantization.png").shape[:2] == (504, 768)


def test_markdown() -> None:
    base, double = known()
    lines = markdown([base.figures(base), double.figures(base)]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| bfloat16 | 2,000 | 16.8889 | 16.0000 | 0.0000 | 0.7935 | - |")
    assert lines[3].endswith("| 0.8512 | +0.0577 ± 0.0000 | 1.0676 | +0.0577 |")


@pytest.mark.parametrize("worse", [0, 1])
def test_a_point_is_where_its_figures_are(tmp_path: Path, worse: int) -> None:
    """Two pictures of different figures differ, two of the same do not."""
    base, double = known()
    figures = [base.figures(base), double.figures(base)]
    save_figure(tmp_path / "one.png", figures)
    figures[1]["sources"]["zh"]["bits_per_byte"] += worse
    save_figure(tmp_path / "two.png", figures)
    assert ((tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()) == (worse == 0)
