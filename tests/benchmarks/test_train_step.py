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


# PEFT looks for the pattern that it made of gate and up among modules, and it is a parameter that they have become.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(("preset", "rank"), [("cpu-olmoe", 16), ("cpu-qwen3", 8)])
def test_families_of_small_experts_train_every_matrix(
    preset: str, rank: int, parse: Parse, train_step: Any, tmp_path: Path
) -> None:
    options = parse("--preset", preset)
    assert (options.rank, options.contestants) == (rank, ["ours", "stock", "experts4bit"])
    random_base = __import__("random_base")
    config = options.config = random_base.config_of(options.preset, num_hidden_layers=1, hidden_size=128, width=64)
    random_base.write_random_base(config, tmp_path)
    options.base, options.device, options.rank = str(tmp_path), "cpu", 2
    trained = {}
    for name in ("ours", "stock"):
        model = train_step.CONTESTANTS[name](options)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads = config.head_dim * config.num_attention_heads if preset == "cpu-qwen3" else 128
    keys = heads * config.num_key_value_heads // config.num_attention_heads
    others = 2 * (128 + heads) + 2 * (128 + keys) + 128 + config.num_local_experts
    expert = 3 * (128 + 64)
    assert trained["ours"] == 2 * (others + config.num_local_experts * expert)
    # Gate and up are one matrix of twice the rank to PEFT, whose B is twice as large as our two.
    assert trained["stock"] == trained["ours"] + 2 * config.num_local_experts * 2 * 64


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
