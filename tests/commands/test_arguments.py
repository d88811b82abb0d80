"""Every public constructor, with values that a person could type by mistake: an object, or one line that names it."""

import inspect
import math
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig
from torch import nn

import lightning_mixcn.callbacks
from lightning_mixcn import CausalLMModule, InstructDataModule, InstructModule, PretrainDataModule, PretrainModule
from lightning_mixcn.arguments import Between, Filled, Name, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.model.lora.options import TrainedOptions
from lightning_mixcn.modules.schedule import WarmupCosine, WarmupStableDecay
from lightning_mixcn.text import ConversationSource, Source
from lightning_mixcn.text.corpus.sources import parse_sources

SOURCE = Source("zh", "zh.jsonl")
CONVERSATIONS = ConversationSource("zh", "zh.jsonl")


class Values(TypedDict, total=False):
    count: Annotated[int, Between(1, 64)]
    share: Annotated[float, Between(0, 1, "(a share)", excluded=(0, 1))]
    flag: bool
    mode: Literal["min", "max"]
    size: Annotated[int, Between(1, 8)] | Literal["auto"] | None
    names: Annotated[list[Annotated[str, Filled("a name")]], Filled("at least one name")]
    folder: Name
    ranks: dict[str, Annotated[int, Between(1, 64)]]
    make: Callable[[int], int]
    anything: Any
    lora: LoraConfig | None


@pytest.mark.parametrize(
    "values",
    [
        {"count": 64, "share": 0.5, "flag": False, "mode": "max", "size": None, "names": ("a",), "ranks": {"w1": 1}},
        {"count": np.int64(1), "share": np.float32(0.5), "size": "auto", "make": abs, "anything": math.nan},
        {"folder": Path("models/tiny"), "names": [Path("zh")]},
        {"unknown": -1, "lora": LoraConfig()},
    ],
)
def test_right_values_pass(values: dict[str, Any]) -> None:
    check_arguments(Values, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "`count=0`: expected at least 1"),
        ({"count": 65}, "`count=65`: expected at most 64"),
        ({"count": None}, "`count=None`: expected a whole number"),
        ({"count": True}, "`count=True`: expected a whole number"),
        ({"count": 2.0}, "`count=2.0`: expected a whole number"),
        ({"count": 1 << 20000}, "`count=a int of very many digits`: expected at most 64"),
        ({"share": 0}, "`share=0`: expected more than 0 (a share)"),
        ({"share": 1.0}, "`share=1.0`: expected less than 1 (a share)"),
        ({"share": math.nan}, "`share=nan`: expected a finite number"),
        ({"share": 10**400}, f"`share={str(10**400)[:80]}…`: expected a finite number"),
        ({"flag": 1}, "`flag=1`: expected true or false"),
        ({"mode": "mean"}, "`mode='mean'`: expected one of min, max"),
        ({"size": 0}, "`size=0`: expected at least 1"),
        ({"size": "abc"}, "`size='abc'`: expected null or a whole number or auto"),
        ({"names": []}, "`names=[]`: expected at least one name"),
        ({"names": "abc"}, "`names='abc'`: expected a list"),
        ({"names": ["a", "b\0"]}, "`names[1]='b\\x00'`: expected a name"),
        ({"ranks": {"w1": 0}}, "`ranks['w1']=0`: expected at least 1"),
        ({"ranks": {1: 1}}, "`ranks[1]=1`: expected text"),
        ({"ranks": []}, "`ranks=[]`: expected a mapping"),
        ({"make": 3}, "`make=3`: expected a function or a class"),
        ({"lora": {"r": 4}}, "`lora={'r': 4}`: expected null or a LoraConfig"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        check_arguments(Values, values, "")
    assert str(raised.value) == message


def test_the_class_and_the_place_are_named() -> None:
    with pytest.raises(UserError, match=r"^`seed=-1`: expected at least 0; see InstructModule$"):
        InstructModule("base", seed=-1)
    with pytest.raises(UserError, match=r"^`sources\[1\]\.weight=nan`: expected a finite number$"):
        PretrainDataModule([SOURCE, Source("en", "en.jsonl", weight=math.nan)])


# ---- every argument of every public class ----

WRONG: list[Any] = [
    None,
    "",
    "abc",
    -1,
    0,
    1.5,
    1e308,
    10**21,
    math.nan,
    [],
    {},
    True,
    "../x",
    math.inf,
    object(),
]


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))])


def _source(kind: type[Any]) -> Callable[..., Any]:
    return lambda **values: parse_sources([values], "sources", kind)


# By class: what makes one of its arguments, and those that it needs. LoRA goes through the module, which checks it.
_CLASSES: dict[type[Any], tuple[Callable[..., Any], dict[str, Any]]] = {
    CausalLMModule: (CausalLMModule, {"base": "base"}),
    PretrainModule: (PretrainModule, {"base": "base"}),
    InstructModule: (InstructModule, {"base": "base"}),
    PretrainDataModule: (PretrainDataModule, {"sources": [SOURCE]}),
    InstructDataModule: (InstructDataModule, {"sources": [CONVERSATIONS]}),
    WarmupCosine: (WarmupCosine, {"optimizer": _optimizer()}),
    WarmupStableDecay: (WarmupStableDecay, {"optimizer": _optimizer()}),
    Source: (_source(Source), {"name": "zh", "path": "zh.jsonl"}),
    ConversationSource: (_source(ConversationSource), {"name": "zh", "path": "zh.jsonl"}),
    LoraConfig: (CausalLMModule, {}),
}
_NEEDED: dict[str, dict[str, Any]] = {
    "BenchmarkEval": {"tasks": ["a"]},
    "ByteBudget": {"text_bytes": 2000},
    "SampleText": {"prompts": ["a"]},
}
for _name in lightning_mixcn.callbacks.__all__:
    _kind = getattr(lightning_mixcn.callbacks, _name)
    assert issubclass(_kind, Callback)
    _CLASSES[_kind] = (_kind, _NEEDED.get(_name, {}))

CASES = [
    pytest.param(kind, name, value, id=f"{kind.__name__}-{name}-{value!r:.12}")
    for kind in _CLASSES
    for name in inspect.signature(kind).parameters
    if name not in ("args", "kwargs") and (kind is not LoraConfig or name in TrainedOptions.__annotations__)
    for value in WRONG
]


def takes(kind: type[Any], name: str) -> set[Any]:
    """Kinds of value that an argument takes."""
    hint = get_type_hints(kind if is_dataclass(kind) else kind.__init__).get(name)
    return {hint, *get_args(hint)}


def check(kind: type[Any], name: str, value: Any) -> None:
    """Construct with one value: an object, or a `UserError` of one line; null and numbers that are none are refused."""
    make, needed = _CLASSES[kind]
    given = {**needed, name: value}
    if kind is LoraConfig:
        try:
            given = {"base": "base", "lora": LoraConfig(**given)}
        except (AttributeError, TypeError, ValueError):  # PEFT's own; the command line reports them in one line
            return
    made, message = None, ""
    try:
        made = make(**given)
    except UserError as error:
        message = str(error)
    if made is None:
        assert "\n" not in message
        assert name in message
    elif isinstance(value, int | float) and {int, float} & takes(kind, name):
        assert math.isfinite(value), "not a number of this project"
        assert 0 <= value < 1e16, "no run can use it"
    elif value is None:
        assert {type(None), Any} & takes(kind, name)


@pytest.mark.parametrize(("kind", "name", "value"), CASES[::13])
def test_a_wrong_argument_is_one_line(kind: type[Any], name: str, value: Any) -> None:
    check(kind, name, value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_every_wrong_argument_is_one_line(kind: type[Any], name: str, value: Any) -> None:
    check(kind, name, value)
