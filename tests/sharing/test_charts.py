"""Curves of a page: all points are in the drawing, ticks can be told apart, long ones are thinned."""

import math
import re

import pytest

from lightning_mixcn.sharing.charts import HEIGHT, WIDTH, line_chart


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([2.0, 3.0], ["2.0", "2.2", "2.4", "2.6", "2.8", "3.0"]),
        ([1e-4, 2.5e-4], None),
        ([0.0, 0.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([-1e7, 1e7], ["-1.2e7", "-0.8e7", "-0.4e7", "0", "0.4e7", "0.8e7", "1.2e7"]),
        ([1.0, 1.9], None),
        ([7.0, 7.0], None),
    ],
)
def test_ticks_are_numbers_that_differ(values: list[float], labels: list[str] | None) -> None:
    chart = line_chart("loss", {"a": dict(enumerate(values))})
    assert chart is not None
    written = [tick.label for tick in chart.up]
    assert labels is None or written == labels
    assert len(set(written)) == len(written) >= 3
    assert all(len(label) <= 7 for label in written)


def test_all_points_are_in_the_drawing() -> None:
    chart = line_chart("loss", {"a": {10: 5.0, 20: -3.0}, "b": {0: 1.0, 1000: math.nan, 500: math.inf}})
    assert chart is not None
    assert chart.left_out == 2
    for line in chart.lines:
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line.points)
        assert re.fullmatch(r"(-?\d+\.\d,-?\d+\.\d ?)+", line.path)
    (first, last), _ = (line.points for line in chart.lines)
    assert first[0] < last[0]
    assert first[1] < last[1]  # up is less


def test_many_values_become_means() -> None:
    chart = line_chart("loss", {"a": {step: float(step % 2) for step in range(3000)}})
    assert chart is not None
    assert chart.averaged == 10
    assert len(chart.lines[0].points) == 300
    assert len({y for _, y in chart.lines[0].points}) == 1  # each mean is a half


def test_nothing_is_no_chart() -> None:
    assert line_chart("loss", {}) is None
    assert line_chart("loss", {"a": {}, "b": {3: math.nan}}) is None
