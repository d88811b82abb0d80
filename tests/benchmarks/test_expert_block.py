"""The benchmark of the expert block: who breaks loses its own figures only, and who wins where."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("expert_block", "contenders.experts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__("expert_block")


SIZES = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "rank": 8, "dropout": 0.0, "warmup": 1, "rounds": 2} | given)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_our_block_is_measured_beside_its_limit(benchmark: Any, dropout: float) -> None:
    figures = benchmark.measure(SIZES, 8, True, options(dropout=dropout))
    assert (figures["rows_per_expert"], figures["absent"]) == (4.0, {})
    assert figures["milliseconds"].keys() == {"ours", "limit"}
    assert figures["share_of_limit"].keys() == {"median", "min", "max"}


def test_one_that_raises_loses_only_itself(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> dict[str, Any]:
        return {"loop": lambda training: None, "broken": lambda training: 1 / 0}

    def cannot_be_made() -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(benchmark, "ours", made)
    monkeypatch.setattr(benchmark, "peers", lambda *_: {"peer": cannot_be_made})
    figures = benchmark.measure(SIZES, 8, False, options())
    assert figures["milliseconds"].keys() == {"loop", "limit"}
    assert figures["absent"] == {
        "peer": "RuntimeError: out of memory", "broken": "ZeroDivisionError: division by zero",
    }  # fmt: skip


def test_what_a_block_that_raised_left_is_not_the_next_ones(benchmark: Any) -> None:
    rows = benchmark.Rows(SIZES, 8, "cpu")

    def halfway() -> Any:
        rows.x.sum().backward()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        rows.run(halfway, [], True)
    y, gradient = rows.run(lambda: rows.x * 1, [], True)
    assert torch.equal(y, rows.x)
    assert torch.equal(gradient, rows.gradient)


@pytest.mark.parametrize(
    ("by_rows", "table"),
    [
        ({1.0: {"loop": 2, "decode": 1}, 4.0: {"loop": 1, "decode": 2}}, [(2.0, "decode"), (math.inf, "loop")]),
        ({4.0: {"loop": 1}, 1.0: {"loop": 1, "decode": 2}}, [(math.inf, "loop")]),
        (
            {1.0: {"a": 1, "b": 2}, 4.0: {"a": 2, "b": 1}, 9.0: {"a": 2, "b": 1}, 16.0: {"a": 1, "b": 2}},
            [(2.0, "a"), (12.0, "b"), (math.inf, "a")],
        ),
    ],
    ids=["two", "one", "back again"],
)
def test_the_fastest_by_rows_of_an_expert(benchmark: Any, by_rows: Any, table: Any) -> None:
    assert benchmark.fastest(by_rows) == table
