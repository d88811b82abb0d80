"""Sums over documents, and the standard error of a difference."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_mixcn.studies.quantization.report import FormatResult, SourceSums, markdown, save_figure, write_formats
from lightning_mixcn.studies.quantization.weights import Sizes


def test_pieces_of_a_document_add_up() -> None:
    parts = [
        {"source": [0, 0, 1], "document": [0, 1, 7], "text_nats": [1.0, 2.0, 9.0], "bytes": [10, 20, 90]},
        {"source": [0, 1], "document": [1, 8], "text_nats": [4.0, 5.0], "bytes": [40, 50]},
    ]
    arrays = [{name: np.array(values) for name, values in part.items()} for part in parts]
    first, second = SourceSums.of(0, arrays), SourceSums.of(1, arrays)
    assert (first.text_nats.tolist(), first.bytes.tolist()) == ([1.0, 6.0], [10, 60])
    assert (second.text_nats.tolist(), second.bytes.tolist()) == ([9.0, 5.0], [90, 50])
    assert first.bits_per_byte() == pytest.approx(7 / math.log(2) / 70)


def test_error_of_documents_of_one_size_is_that_of_their_mean() -> None:
    draw = np.random.default_rng(0)
    base, change = draw.uniform(50, 90, 30), draw.normal(2, 1, 30)
    size = np.full(30, 100)
    found, error = SourceSums(base + change, size).difference(SourceSums(base, size))
    bits = change / math.log(2) / 100
    assert found == pytest.approx(bits.mean())
    assert error == pytest.approx(bits.std(ddof=1) / math.sqrt(30))


def test_error_of_documents_of_many_sizes_is_the_bootstrap_s() -> None:
    draw = np.random.default_rng(1)
    size = draw.integers(20, 400, 300)
    base = size * draw.uniform(0.5, 0.9, 300)
    worse = base + size * draw.normal(0.02, 0.01, 300)
    _, error = SourceSums(worse, size).difference(SourceSums(base, size))
    drawn = draw.integers(0, 300, (4000, 300))
    resampled = (worse - base)[drawn].sum(1) / math.log(2) / size[drawn].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.05)


def test_one_document_has_no_error() -> None:
    one, other = SourceSums(np.array([2.0]), np.array([4])), SourceSums(np.array([1.0]), np.array([4]))
    change, error = one.difference(other)
    assert change == pytest.approx(1 / math.log(2) / 4)
    assert math.isnan(error)


def test_figures() -> None:
    sizes = Sizes(bytes=60, weights=100, quantised_bytes=40, quantised_weights=80)
    size = np.array([10, 10])
    base = FormatResult("bfloat16", 200, "memory", sizes, 0.0, {"zh": SourceSums(np.array([4.0, 6.0]), size)})
    worse = FormatResult("x.gguf", 70, "file", sizes, 0.1, {"zh": SourceSums(np.array([5.0, 8.0]), size)})
    found = worse.figures(base)
    assert (found["bits_per_quantised_weight"], found["bits_per_weight"], found["bytes"]) == (4.0, 4.8, 70)
    source = found["sources"]["zh"]
    assert source["difference"] == pytest.approx(3 / math.log(2) / 20)
    assert source["standard_error"] == pytest.approx(0.5 / math.log(2) / 10)
    assert (source["documents"], source["bytes_of_text"]) == (2, 20)
    assert base.figures(base)["sources"]["zh"]["standard_error"] is None


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
    table = write_formats(tmp_path, {"src": "x"}, known())
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
    assert imread(tmp_path / "quantization.png").shape[1] == 864


def test_markdown() -> None:
    base, double = known()
    lines = [" ".join(line.split()) for line in markdown([base.figures(base), double.figures(base)]).splitlines()]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| bfloat16 | 2,000 | 16.8889 | 16.0000 | 0.0000 | 0.7935 | - |")
    assert lines[3].endswith("| 0.8512 | +0.0577 ± 0.0000 | 1.0676 | +0.0577 |")


def test_the_figure_has_the_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    draw = Figure.savefig

    def kept(self: Figure, path: Path) -> None:
        drawn.append(self)
        draw(self, path)

    monkeypatch.setattr(Figure, "savefig", kept)
    base, double = known()
    save_figure(tmp_path / "one.png", [base.figures(base), double.figures(base)])
    (figure,) = drawn
    (axis,) = figure.axes
    points = [line.get_xdata()[0] for line in axis.get_lines() if line.get_marker() == "o"]  # type: ignore[index]
    assert points == pytest.approx([4 / math.log(2) / 100] * 2)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["nf4-double\n4.80 bits a weight"]
    assert "more than with bfloat16 (16.00 bits a weight)" in figure.get_suptitle()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["zh: 0.7935", "en: 1.0099"]
    # Whole texts: nothing reaches over the edge of the picture.
    width, height = figure.canvas.get_width_height()
    for text in [figure._suptitle, *axis.get_yticklabels(), axis.xaxis.label, legend, *axis.texts]:  # type: ignore[attr-defined]
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
