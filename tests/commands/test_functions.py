"""Subcommands that are one function: arguments, help and errors, and a whole quantise."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.commands import table
from lightning_mixcn.commands.functions import parse_function
from lightning_mixcn.errors import UserError
from lightning_mixcn.model import load_mixtral


def test_quantize(tmp_path: Path, tiny_base: Path) -> None:
    assert main(["quantize", str(tiny_base), str(tmp_path / "small"), "--dtype=float32"]) == 0
    assert load_mixtral(tmp_path / "small", dtype="float32").config.num_local_experts == 4


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["upcycle", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "usage: mixcn upcycle" in text
    assert "--num_experts" in text
    assert "Number of experts" in text


@dataclass(frozen=True)
class Colour:
    """A colour.

    Args:
        names: Names.
        hue: Angle, in degrees.
    """

    names: list[str]
    hue: int = 0

    def __post_init__(self) -> None:
        if self.hue > 360:
            raise UserError(f"`hue={self.hue}`: expected at most 360")


def takes_all(
    src: list[str], *, text: list[str], more: Sequence[str] = (), colour: Colour, bright: bool = False
) -> None:
    """Take everything.

    Args:
        src: Sources.
        text: Texts.
        more: More texts.
        colour: Colour of the texts.
        bright: Take more light.
    """


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], dict[str, Any]]:
    monkeypatch.setitem(table.FUNCTIONS, "takes_all", __name__)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, SimpleNamespace(takes_all=takes_all)))
    return lambda arguments: parse_function("takes_all", arguments)[1]


Takes = Callable[[list[str]], dict[str, Any]]


@pytest.mark.parametrize(
    "given",
    [
        ["a=1", "no"],
        ["[a=1,no]"],
        ['["a=1", "no"]'],
        ["a=1", "--text", "no"],
        ["a=1", "--text=no"],
        ["a=1", "--text+=no"],
    ],
    ids=" ".join,
)
def test_a_list_is_several_values(given: list[str], takes: Takes) -> None:
    parsed = takes(["s", "t", "--names=red", "--text", *given, "--bright"])
    assert parsed == {"src": ["s", "t"], "text": ["a=1", "no"], "more": [], "colour": Colour(["red"]), "bright": True}
    assert takes(["s", "--text=x", "--names=a", "--more", "y", "z", "--hue=3"])["more"] == ["y", "z"]
    assert takes(["--text=x", "--names=a", "--more", "y", "z", "--hue=3", "--bright=true", "[s,t]"])["src"] == [
        "s",
        "t",
    ]


def test_fields_of_a_dataclass_are_options(takes: Takes, capsys: pytest.CaptureFixture[str]) -> None:
    assert takes(["s", "--text=x", "--hue", "7", "--names", "a", "b"])["colour"] == Colour(["a", "b"], 7)
    with pytest.raises(UserError, match="at most 360"):
        takes(["s", "--text=x", "--names=a", "--hue=400"])
    with pytest.raises(UserError, match="required: names"):
        takes(["s", "--text=x"])
    with pytest.raises(SystemExit):
        takes(["--help"])
    assert "Angle, in degrees." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--quick"], True),
        (["--quick", "true"], True),
        (["--quick", "false"], False),
        (["--quick=false"], False),
        ([], False),
        (["--quick", "--out=a"], True),
    ],
)
def test_a_flag_needs_no_value(given: list[str], expected: bool) -> None:
    for arguments in (["recipe.yaml", "--out=a", *given], ["--out=a", *given, "recipe.yaml"]):
        _, parsed = parse_function("compare", arguments)
        assert parsed["quick"] is expected
        assert parsed["recipe"] == "recipe.yaml"


def test_a_flag_of_a_dataclass_takes_no_positional_argument() -> None:
    _, parsed = parse_function("evaluate", ["--apply_chat_template", "--shard", "model", "--tasks=a", "--out=b"])
    assert parsed["src"] == "model"
    assert parsed["options"].apply_chat_template


@pytest.mark.parametrize(("given", "expected"), [("null", None), ("[]", []), ("a", ["a"]), ("[null]", ["null"])])
def test_a_list_that_may_be_null(given: str, expected: list[str] | None) -> None:
    assert parse_function("export", ["a", "b", f"--adapter={given}"])[1]["adapter"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle"], "the following arguments are required: src, out; see mixcn upcycle --help"),
        (["quantize", "a", "b", "--bits=3"], "--bits"),
        (["upcycle", "a", "b", "--num_experts=many"], "num_experts"),
        (["quantize", "nowhere", "b"], "nowhere"),
        (["chat", "x", "--max_new_tokens=1000000000000"], "`max_new_tokens=1000000000000`: expected at most 1048576"),
        (["chat", "x", "--temperature=.nan"], "`temperature=nan`: expected a finite number"),
        (["chat", "x", "--seed=null"], "seed: expected a whole number, got 'None'; see mixcn chat --help"),
        (["chat", "x", "--temprature=1"], "--temprature=1 (did you mean '--temperature'?); see mixcn chat --help"),
        (["export", "a", "b", "--format=pfet"], "or gguf, got 'pfet' (did you mean 'peft'?); see mixcn export --help"),
        (["vocab", "trian"], "(did you mean 'train'?); see mixcn vocab --help"),
        (["vocab", "tr", "a", "--out=b"], "invalid choice: 'tr'"),
        (["upcycle", "a", "b", "--num_exp=4"], "--num_exp=4 (did you mean '--num_experts'?)"),
        (["upcycle", "a", "b", "--noise=-1"], "`noise=-1.0`: expected at least 0"),
        (["vocab", "train", "[a", "--out=b"], "`corpus=[a` is no list"),
        (["vocab", "train", "[" * 3000, "--out=b"], "[[[` is no list"),
        (["vocab", "train", "[a, [b]]", "--out=b"], "`corpus=[a, [b]]` is no list"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixcn: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
