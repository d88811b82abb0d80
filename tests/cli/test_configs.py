"""``mixcn configs``: what the package carries is listed, printed and copied, and a copy works where it is."""

from pathlib import Path

import pytest
import yaml

from lightning_mixcn.cli import main
from lightning_mixcn.cli.configs import carried_configs
from lightning_mixcn.studies.comparison.recipe import read_recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_are_listed_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    there = [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")]
    rows = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert rows.keys() == set(there)
    assert rows["trainer/hsdp"] == "Several nodes, one copy of the base in each"
    assert "trainer: mixcn fit --config YOURS --config NAME" in lines


@pytest.mark.parametrize("name", ["trainer/gpu", "trainer/gpu.yaml", "configs/trainer/gpu.yaml"])
def test_one_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name]) == 0
    assert capsys.readouterr().out == (CONFIGS / "trainer/gpu.yaml").read_text(encoding="utf-8")


def test_one_is_copied_and_never_over_another_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "pretrain_olmoe_1b_7b", "--out", "zh.yaml"]) == 0
    assert "then: mixcn fit --config zh.yaml --plan" in capsys.readouterr().out
    assert (folder / "zh.yaml").read_bytes() == (CONFIGS / "pretrain_olmoe_1b_7b.yaml").read_bytes()
    assert main(["configs", "demo", "--out", "zh.yaml"]) == 2
    assert "`out=zh.yaml` exists" in capsys.readouterr().err
    assert yaml.safe_load((folder / "zh.yaml").read_text())["model"]["class_path"] == "PretrainModule"


def test_a_copied_recipe_finds_its_configurations(folder: Path) -> None:
    assert main(["configs", "studies/experts", "--out", "recipe.yaml"]) == 0
    for needed in yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["needs"]:
        (folder / needed).mkdir(parents=True)
    recipe = read_recipe(folder / "recipe.yaml", quick=False)
    assert [Path(config).name for config in recipe.config] == ["pretrain_mixtral_8x7b.yaml", "gpu.yaml"]


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "pretrain_mixtral"]) == 2
    error = capsys.readouterr().err
    assert "there is no such configuration (did you mean 'pretrain_mixtral_8x7b'?)" in error
    assert error.count("\n") == 1


def test_they_are_found_by_path() -> None:
    assert carried_configs()["trainer/gpu"].read_bytes() == (CONFIGS / "trainer/gpu.yaml").read_bytes()
