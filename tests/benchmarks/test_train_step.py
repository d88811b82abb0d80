"""Options of the benchmark of a training step."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Parse = Callable[..., argparse.Namespace]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Options of a command line."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = __import__("train_step")

    def parsed(*arguments: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["train_step.py", *arguments])
        options: argparse.Namespace = module.parse("")
        return options

    return parsed


def test_a_preset_then_the_defaults_fill_what_is_not_given(parse: Parse) -> None:
    options = parse("--preset", "full-8x7b-32k", "--rank", "8", "--packages", "axolotl=a=b", "unsloth=c")
    assert (options.rank, options.micro_batch_size, options.sequence_length) == (8, 8, 4096)
    assert (options.optimizer, options.rounds, options.contestants) == ("adamw8bit", 12, ["ours"])
    assert options.packages == {"axolotl": "a=b", "unsloth": "c"}


def test_without_a_preset_stock_takes_part(parse: Parse) -> None:
    assert parse("--base", "base", "--text", "text").contestants == ["ours", "stock"]


@pytest.mark.parametrize("arguments", [[], ["--base", "base"], ["--preset", "cpu-small", "--contestants", "stock"]])
def test_what_cannot_be_measured(parse: Parse, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
