"""Subcommands that are one function: arguments, help and errors, and a whole quantise."""

import sys
from pathlib import Path

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.commands import functions as function_cli
from lightning_mixcn.commands import table
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


@pytest.mark.parametrize("given", [["a=1", "b=2"], ["[a=1,b=2]"], ["a=1", "--text", "b=2"]])
def test_a_list_is_several_values(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def takes_a_list(src: str, *, text: list[str], mode: str = "x") -> None:
        seen.append(text)

    monkeypatch.setitem(table.FUNCTIONS, "takes_a_list", __name__)
    monkeypatch.setattr(sys.modules[__name__], "takes_a_list", takes_a_list, raising=False)
    function_cli.run_function("takes_a_list", ["s", "--text", *given, "--mode=y"])
    assert seen == [["a=1", "b=2"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--quick"], True),
        (["--quick", "true"], True),
        (["--quick", "false"], False),
        (["--quick=false"], False),
        ([], False),
        (["--quick", "--out=b"], True),
    ],
)
def test_a_flag_needs_no_value(given: list[str], expected: bool) -> None:
    _, parsed = function_cli.parse_function("compare", ["recipe.yaml", "--out=a", *given])
    assert parsed["quick"] is expected
    assert parsed["recipe"] == "recipe.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle"], "the following arguments are required: src, out; see mixcn upcycle --help"),
        (["quantize", "a", "b", "--bits=3"], "--bits"),
        (["upcycle", "a", "b", "--num_experts=many"], "num_experts"),
        (["quantize", "nowhere", "b"], "nowhere"),
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
