"""Curves for a page: points, ticks and labels, which its template draws as SVG, in the reader's fonts and colours."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

WIDTH, HEIGHT = 420, 234  # units of the drawing; about as many pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 38
_MOST_POINTS = 300
_FEW_POINTS = 30  # up to which each one is marked


class Tick(NamedTuple):
    """A mark of an axis.

    Args:
        at: Its place in the drawing.
        label: Its number.
    """

    at: float
    label: str


class Line(NamedTuple):
    """A curve.

    Args:
        name: Name for the legend.
        points: Places in the drawing.
        marked: Each point is to be marked.
    """

    name: str
    points: list[tuple[float, float]]
    marked: bool

    @property
    def path(self) -> str:
        """Return the points as SVG's ``polyline`` takes them."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """A drawing of curves over optimizer steps.

    Args:
        title: Text above it, with the unit.
        lines: The curves.
        across: Ticks of the steps.
        up: Ticks of the values.
        averaged: Steps whose mean is one point; 1 if every value is drawn.
        left_out: Values that are no finite numbers.
    """

    title: str
    lines: list[Line]
    across: list[Tick]
    up: list[Tick]
    averaged: int
    left_out: int


def line_chart(title: str, curves: Mapping[str, Mapping[int, float]]) -> Chart | None:
    """Lay out curves.

    Args:
        title: Text above it, with the unit.
        curves: Values by optimizer step, by the name of each curve.

    Returns:
        ``None`` where there is nothing to draw.
    """
    finite = {name: [(x, y) for x, y in sorted(each.items()) if math.isfinite(y)] for name, each in curves.items()}
    left_out = sum(map(len, curves.values())) - sum(map(len, finite.values()))
    thinned = {name: _thinned(points) for name, points in finite.items() if points}
    if not thinned:
        return None
    steps = [x for points in thinned.values() for x, _ in points]
    values = [y for points in thinned.values() for _, y in points]
    across, up = _ticks(min(0, *steps), max(steps), whole=True), _ticks(min(values), max(values))
    x_low, x_high = min(0.0, *steps), float(max(steps))
    y_low, y_high = min(up[0], *values), max(up[-1], *values)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - x_low) / ((x_high - x_low) or 1),
            HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (y - y_low) / ((y_high - y_low) or 1),
        )

    lines = [
        Line(name, [place(x, y) for x, y in points], len(points) <= _FEW_POINTS) for name, points in thinned.items()
    ]
    return Chart(
        title,
        lines,
        [Tick(place(x, 0)[0], f"{x:,.0f}") for x in across if x_low <= x <= x_high],
        [Tick(place(0, y)[1], label) for y, label in zip(up, _labels(up), strict=True)],
        max(_bucket(points) for points in finite.values()),
        left_out,
    )


def _bucket(points: list[tuple[int, float]]) -> int:
    return math.ceil(max(1, len(points)) / _MOST_POINTS)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return means of as many neighbours as leave no more points than can be seen."""
    size = _bucket(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    # Takes a second, which only those wait for who draw.
    from matplotlib.ticker import MaxNLocator

    if low == high:
        low, high = (low - abs(low) * 0.05, high + abs(high) * 0.05) if low else (0.0, 1.0)
    return [float(tick) for tick in MaxNLocator(nbins=5, integer=whole).tick_values(low, high)]


def _labels(ticks: list[float]) -> list[str]:
    """Write numbers with as many digits as tell them apart."""
    gap = min((abs(b - a) for a, b in pairwise(ticks)), default=1.0)
    largest = max(map(abs, ticks))
    if largest and not 1e-2 <= largest < 1e6:
        power = math.floor(math.log10(largest))
        return [f"{tick / 10**power:.4g}e{power}" if abs(tick) > gap / 1e6 else "0" for tick in ticks]
    digits = next((places for places in range(12) if abs(round(gap, places) - gap) < gap / 1e6), 12)
    return [f"{tick:,.{digits}f}" for tick in ticks]


def picture(figure: Any) -> str:
    """Return a figure of Matplotlib as a data URI of a PNG, sharp on screens of two pixels a point."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
