"""What is optional and not there is one line with pip's command, wherever it is needed."""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.cli import main
from lightning_mixcn.errors import EXTRAS, MissingPackageError, pip_command, require_package
from lightning_mixcn.studies.tasks import load_benchmarks

ROOT = Path(__file__).parents[2]
# Extras of those who work on the project.
FOR_DEVELOPERS = {"demo", "dev", "docs", "notebook"}


def run_of(base: Path, **trainer: Any) -> list[str]:
    """Write the configuration of a run, and return the command that starts it."""
    config = {
        "model": {"class_path": "PretrainModule", "init_args": {"base": str(base), "lora": {"r": 4}}},
        "data": {
            "class_path": "PretrainDataModule",
            "init_args": {"sources": [{"name": "zh", "path": "zh.jsonl"}], "sequence_length": 32, "val_fraction": 0.0},
        },
        "trainer": {"accelerator": "cpu", "max_steps": 1, **trainer},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["fit", "--config", "run.yaml"]


TEXT = ["--text", "zh=zh.jsonl", "--sequence_length=64", "--out", "out"]
# package → the ways that lead to it.
USES: dict[str, list[Callable[[Path], list[str]]]] = {
    "gguf": [
        lambda base: ["upcycle", "a.gguf", "out"],
        lambda base: ["quantization", str(base), *TEXT, "--gguf", "a.gguf"],
    ],
    "llama_cpp": [
        lambda base: ["quantization", str(base), *TEXT, "--gguf", "a.gguf"],
    ],
    "lm_eval": [
        lambda base: ["evaluate", str(base), "--tasks", "mmlu", "--out", "out.json"],
        lambda base: ["experts", str(base), *TEXT, "--tasks", "mmlu"],
        lambda base: ["data", "report", "zh.jsonl", "--against", "mmlu", "--max_changed", "0", "--out", "out"],
        lambda base: run_of(base, callbacks=[{"class_path": "BenchmarkEval", "init_args": {"tasks": ["mmlu"]}}]),
    ],
    "rensa": [
        lambda base: ["data", "report", "zh.jsonl", "--out", "out"],
        lambda base: ["data", "clean", "zh.jsonl", "--out", "out"],
    ],
    "shtab": [lambda base: ["--print_completion=shtab-bash"]],
    "wandb": [lambda base: run_of(base, logger={"class_path": "WandbLogger"})],
}  # fmt: skip
WAYS = [(package, number) for package, ways in USES.items() for number in range(len(ways))]


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS.values()) == project["optional-dependencies"].keys() - FOR_DEVELOPERS
    assert USES.keys() == EXTRAS.keys()


@pytest.mark.parametrize(("package", "number"), WAYS)
def test_every_use_says_how_to_install_it(
    package: str,
    number: int,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setitem(sys.modules, package, None)
    Path("zh.jsonl").write_text("".join(json.dumps({"text": f"你好{n}"}) + "\n" for n in range(9)), encoding="utf-8")
    Path("a.gguf").write_bytes(b"GGUF")
    assert main(USES[package][number](tiny_base)) == 2
    *_, said = capfd.readouterr().err.splitlines()
    assert said.startswith("mixcn: error: ")
    assert pip_command(package) in said
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_classes_say_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lightning_mixcn\[eval\]'"):
        load_benchmarks(["mmlu"])
    with pytest.raises(ImportError, match=r"^x needs the package lm_eval, .*\[eval\]', or y$"):
        require_package("lm_eval", "x", ", or y")
