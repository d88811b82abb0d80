"""The benchmark of a training step: its options, and the limit where a GPU has no room for it beside a model."""

import argparse
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Parse = Callable[..., argparse.Namespace]


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("train_step")


@pytest.fixture
def parse(train_step: Any, monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Options of a command line."""

    def parsed(*arguments: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["train_step.py", *arguments])
        options: argparse.Namespace = train_step.parse("")
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


class Questions:
    """A connection whose other end has asked all that it will."""

    def __init__(self, *asked: Any) -> None:
        self._asked: Iterator[Any] = iter(asked)
        self.answers: list[Any] = []

    def recv(self) -> Any:
        return next(self._asked)

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


def test_the_limit_is_measured_once_the_model_is_freed(train_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = list[weakref.ref[Any]]()

    def contestant(*_: Any) -> tuple[Callable[[], float], int]:
        model = torch.nn.Linear(1, 1)
        models.append(weakref.ref(model))
        return lambda: float(model.in_features), 2

    def limit(_: Any) -> Callable[[], float]:
        assert models[0]() is None
        return lambda: 0.5

    monkeypatch.setattr(train_step, "contestant", contestant)
    monkeypatch.setattr(train_step, "step_limit", limit)
    questions = Questions(True, True, None, 3)
    train_step.serve(questions, "ours", argparse.Namespace(device="cpu"))
    trained, *seconds, peak, limits = questions.answers
    assert (trained, seconds, limits) == (2, [1.0, 1.0], [0.5] * 3)
    assert peak > 0
