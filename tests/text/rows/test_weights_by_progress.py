"""Rows follow weights that go by the progress of the run, in every window and over the whole of it."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_mixcn.text import PACKINGS, PlainText, Row, StreamPlan, TextTokenizer, TrainingDocuments, load_tokenizer

Documents = Callable[..., TrainingDocuments]
Weights = float | Mapping[float | str, float]

ROWS, WINDOW = 640, 64
SCHEDULES: dict[str, tuple[Weights, ...]] = {
    "ramp": ({0.0: 0.5, 0.2: 0.9}, {0.0: 0.5, 0.2: 0.1}),
    "one is constant": ({"0.1": 0.2, "0.9": 3.0}, 1.0),
    "from nothing and to nothing": ({0.0: 1.0, 0.7: 0.0}, {0.3: 0.0, 1.0: 0.6}, 0.2),
    "a step": ({0.5: 0.9, 0.5001: 0.3}, {0.5: 0.1, 0.5001: 0.7}),
}


def asked_of(weights: Sequence[Weights], row: int, rows: int) -> list[float]:
    """Compute the shares at a row with exact fractions, apart from the code."""
    place, found = Fraction(row, rows), []
    for weight in weights:
        given = weight if isinstance(weight, Mapping) else {0.0: weight}
        points = [(Fraction(str(at)), Fraction(str(value))) for at, value in given.items()]
        value = points[0][1] if place <= points[0][0] else points[-1][1]
        for (left, first), (right, second) in pairwise(points):
            if left <= place <= right:
                value = first + (second - first) * (place - left) / (right - left)
        found.append(value)
    return [float(value / sum(found)) for value in found]


def plan_of(
    texts: Sequence[list[str]], weights: Sequence[Weights], tokenizer: TextTokenizer, training: Documents,
    max_epochs: Sequence[int | None] = (None, None, None), **settings: Any,
) -> StreamPlan:  # fmt: skip
    parts = [
        training(text, name=f"s{number}", weight=weight, max_epochs=epochs)
        for number, (text, weight, epochs) in enumerate(zip(texts, weights, max_epochs, strict=False))
    ]
    given = {"sequence_length": 64, "num_streams": 64, "seed": 0, "progress_rows": ROWS} | settings
    return StreamPlan(parts, PlainText(tokenizer), **given)


def rows_of(plan: StreamPlan, number: int) -> list[Row]:
    streams = plan.open(range(plan.num_streams))
    return [streams[row % plan.num_streams].next_row() for row in range(number)]


def tokens_of(part: Any) -> float:
    return len(part.tokens)


def require_followed(
    rows: list[Row], weights: Sequence[Weights], size: Callable[[Any], float] = tokens_of, bound: float = 0.05
) -> None:
    """Compare each window, and all rows together, with what is asked for in its rows; full ones count for more."""
    served_RN = np.zeros((len(rows), len(weights)))
    for number, row in enumerate(rows):
        for part in row:
            served_RN[number, part.source] += size(part)
    asked_RN = np.asarray([asked_of(weights, row, ROWS) for row in range(len(rows))]) * served_RN.sum(1, keepdims=True)
    sums_RN, asked_sums_RN = (np.cumsum(np.vstack([np.zeros(len(weights)), each]), 0) for each in (served_RN, asked_RN))
    for length, most in ((WINDOW, bound), (len(rows), 0.01)):
        off_RN = sums_RN[length:] - sums_RN[:-length] - (asked_sums_RN[length:] - asked_sums_RN[:-length])
        total_R1 = (sums_RN[length:] - sums_RN[:-length]).sum(1, keepdims=True)
        assert np.abs(off_RN / total_R1).max() <= most


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    """Make short paragraphs, long documents and some of about a row."""
    draw = random.Random(0)
    words = ["the", "of", "中", "大", "that"]
    lengths = [[draw.randint(3, 20) for _ in range(900)], [3_000 + draw.randint(0, 9_000) for _ in range(5)],
               [draw.randint(30, 90) for _ in range(300)]]  # fmt: skip
    return [[" ".join(draw.choices(words, k=length)) for length in part] for part in lengths]


@pytest.mark.parametrize("num_streams", [8, 64])
@pytest.mark.parametrize("packing", ["documents", "best_fit"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_window_follows_the_weights(
    schedule: str, packing: str, num_streams: int, texts: list[list[str]], tokenizer: TextTokenizer, training: Documents
) -> None:
    weights = SCHEDULES[schedule]
    plan = plan_of(texts, weights, tokenizer, training, packing=packing, num_streams=num_streams)
    require_followed(rows_of(plan, ROWS), weights)


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
@pytest.mark.parametrize("schedule", ["ramp", "from nothing and to nothing"])
def test_weights_of_bytes_are_followed_in_bytes(
    schedule: str, packing: str, tiny_base: Path, training: Documents
) -> None:
    """English and Chinese with a token for each byte of one and about a third of the other's."""
    tokenizer = load_tokenizer(tiny_base)
    draw = random.Random(1)
    texts = [["the of that " * draw.randint(1, 9) for _ in range(300)], ["大中这有" * 700 for _ in range(30)]]
    texts.append(["大中 the " * draw.randint(2, 20) for _ in range(300)])
    weights = SCHEDULES[schedule]
    plan = plan_of(texts, weights, tokenizer, training, packing=packing, weight_unit="bytes")
    rows = rows_of(plan, ROWS)
    require_followed(rows, weights, lambda part: len(tokenizer.decode(part.tokens[part.tokens > 2].tolist()).encode()))


class Whole(PlainText):
    """Documents that rows must not cut, as conversations are."""

    keeps_whole = True


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whole_documents_follow_the_weights(
    schedule: str, packing: str, tokenizer: TextTokenizer, training: Documents
) -> None:
    draw = random.Random(2)
    texts = [["the " * draw.randint(*lengths) for _ in range(400)] for lengths in ((2, 9), (10, 30), (2, 30))]
    weights = SCHEDULES[schedule]
    plan = plan_of(texts, weights, tokenizer, training, packing=packing)
    # Documents of up to half a row that are not cut.
    require_followed(rows_of(replace(plan, encoder=Whole(tokenizer)), ROWS), weights, bound=0.07)


def test_the_others_take_the_place_of_a_source_that_ends(tokenizer: TextTokenizer, training: Documents) -> None:
    """What they have of each other goes on as their weights say, in the first rows after the end, too."""
    texts = [["the " * 60] * 150, ["of " * 20] * 300, ["that " * 20] * 300]
    weights: tuple[Weights, ...] = ({0.0: 0.8, 0.6: 0.0}, {0.0: 0.1, 0.6: 0.8}, 0.1)
    rows = rows_of(plan_of(texts, weights, tokenizer, training, max_epochs=[1, None, None], num_streams=8), ROWS)
    first = max(number for number, row in enumerate(rows) if any(part.source == 0 for part in row)) + 8
    assert 200 < first < 400
    after = [part for row in rows[first : first + 80] for part in row]
    asked = np.mean([asked_of(weights[1:], row, ROWS) for row in range(first, first + 80)], 0)
    served = [sum(len(part.tokens) for part in after if part.source == source) for source in (1, 2)]
    assert np.asarray(served) / sum(served) == pytest.approx(asked, abs=0.03)


def test_a_source_without_weight_fills_in_where_all_others_have_ended(
    tokenizer: TextTokenizer, training: Documents
) -> None:
    texts = [["the " * 60] * 100, ["of " * 20] * 300]
    plan = plan_of(texts, [1.0, {0.0: 0.5, 0.1: 0}], tokenizer, training, max_epochs=[1, None], num_streams=8)
    rows = rows_of(plan, ROWS)
    assert all(sum(len(part.tokens) for part in row) == 64 for row in rows)
    assert {part.source for row in rows[-100:] for part in row} == {1}


def test_past_the_planned_rows_the_last_weights_hold(tokenizer: TextTokenizer, training: Documents) -> None:
    texts = [["the " * 20] * 100, ["of " * 20] * 300]
    plan = plan_of(texts, SCHEDULES["ramp"], tokenizer, training, progress_rows=128)
    served = np.zeros(2)
    for row in rows_of(plan, ROWS)[128:]:
        for part in row:
            served[part.source] += len(part.tokens)
    assert served / served.sum() == pytest.approx((0.9, 0.1), abs=0.01)


@pytest.mark.parametrize("unit", ["tokens", "bytes"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_those_of_a_stream_that_never_stopped(
    packing: str, unit: Any, texts: list[list[str]], tokenizer: TextTokenizer, training: Documents
) -> None:
    """Saved and loaded as JSON after each row."""
    weights = SCHEDULES["from nothing and to nothing"]
    plan = plan_of(texts, weights, tokenizer, training, packing=packing, num_streams=5, weight_unit=unit)
    whole = plan.open([3])[3]
    state = None
    for _ in range(ROWS // 5):
        stopped = plan.open([3], {} if state is None else {3: state})[3]
        expected, row = whole.next_row(), stopped.next_row()
        assert [(part.source, part.document, part.offset, part.tokens.tolist()) for part in row] == [
            (part.source, part.document, part.offset, part.tokens.tolist()) for part in expected
        ]
        state = json.loads(json.dumps(stopped.state()))
        assert state == json.loads(json.dumps(whole.state()))


@pytest.mark.parametrize("packing", PACKINGS)
def test_equal_weights_at_all_points_are_a_constant_weight(
    packing: str, texts: list[list[str]], tokenizer: TextTokenizer, training: Documents
) -> None:
    constant = plan_of(texts, (0.7, 0.2, 0.1), tokenizer, training, packing=packing, progress_rows=None)
    points = plan_of(texts, ({0.0: 0.7, 1.0: 0.7}, 0.2, {0.5: 0.1}), tokenizer, training, packing=packing)
    for first, second in zip(rows_of(constant, 200), rows_of(points, 200), strict=True):
        assert [(part.source, part.document, part.offset) for part in first] == [
            (part.source, part.document, part.offset) for part in second
        ]
