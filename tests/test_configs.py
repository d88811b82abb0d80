"""Every shipped configuration parses, and a mistake in one would be noticed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_mixcn.studies.comparison.study as compare
from lightning_mixcn.cli import main
from lightning_mixcn.cli.settings import settle_tokenizer
from lightning_mixcn.cli.trainer import MixcnCLI
from lightning_mixcn.studies.comparison.recipe import Recipe, read_recipe

FOLDER = Path(__file__).parents[1] / "configs"
RUNS = sorted(FOLDER.glob("*.yaml"))
RECIPES = sorted(FOLDER.glob("studies/*.yaml"))
OVERLAYS = sorted({*FOLDER.glob("*/*.yaml")} - {*RECIPES})


class ParsedError(Exception):
    """Raised where a run would begin to read files."""


@pytest.fixture(autouse=True)
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    configurations: list[Any] = []

    def stop(cli: MixcnCLI) -> None:
        configurations.append(cli.config[cli.subcommand])
        raise ParsedError

    monkeypatch.setattr(MixcnCLI, "before_instantiate_classes", stop)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return configurations


def test_there_are_some() -> None:
    assert {path.name for path in RUNS} >= {
        f"{task}_{model}.yaml"
        for task in ("pretrain", "instruct")
        for model in ("mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b")
    }
    assert {path.name for path in OVERLAYS} >= {"cpu.yaml", "gpu.yaml"}
    recipes = {"vocabulary", "initialisation", "training", "replay", "forgetting", "experts", "revert", "preference"}
    assert {path.stem for path in RECIPES} == recipes
    assert {*RUNS, *OVERLAYS, *RECIPES} == {*FOLDER.rglob("*.yaml")}


def read_shipped(path: Path, quick: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Read a recipe where the files are that it needs."""
    monkeypatch.chdir(folder)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for needed in (content | (content["quick"] if quick else {})).get("needs", {}):
        Path(needed).mkdir(parents=True, exist_ok=True)
    return read_recipe(path, quick)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_parses(
    path: Path, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after_parsing: list[Any]
) -> None:
    monkeypatch.setattr(compare, "require_harness", lambda: None)
    recipe = read_shipped(path, quick, tmp_path, monkeypatch)
    compare._check_commands(recipe, Path("prepared"))
    # An option given twice is checked twice: one parse for all arms.
    with pytest.raises(ParsedError):
        main(["fit", *(option for arm in recipe.arms for option in recipe.options(arm, Path("prepared")))])
    config = stop_after_parsing[0]
    for key in (key for arm in recipe.arms.values() for key in (*recipe.settings, *arm)):
        compare._require_key(config.as_dict(), key, "an arm")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_an_unknown_key_of_a_recipe_fails(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for place in (content, content["quick"]):
        place["no_such_key"] = 1
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(ValueError, match=r"no_such_key` of .* is no key of a recipe"):
            read_recipe(tmp_path / "changed.yaml", quick=False)
        del place["no_such_key"]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_it_parses(path: Path, command: str) -> None:
    with pytest.raises(ParsedError):
        main([command, "--config", str(path)])


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_overlay_parses(overlay: Path) -> None:
    with pytest.raises(ParsedError):
        main(["fit", "--config", str(RUNS[0]), "--config", str(overlay)])


@pytest.mark.parametrize("path", [*RUNS, *OVERLAYS], ids=lambda path: path.name)
def test_an_unknown_key_fails(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In each mapping of the file, one after the other."""
    for number, mapping in enumerate(mappings(yaml.safe_load(path.read_text(encoding="utf-8")))):
        whole, place = mapping
        place["no_such_key"] = 1
        changed = tmp_path / f"{number}.yaml"
        changed.write_text(yaml.safe_dump(whole), encoding="utf-8")
        base = [] if path in RUNS else ["--config", str(RUNS[0])]
        assert main(["fit", *base, "--config", str(changed)]) == 2
        error = capsys.readouterr().err
        assert "no_such_key" in error
        assert error.count("mixcn: error:") == 1
        del place["no_such_key"]


def mappings(whole: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the top, and the arguments of each class and of the trainer."""
    found = [whole]
    for key in ("model", "data"):
        if key in whole:
            found.append(whole[key]["init_args"])
    if "trainer" in whole:
        found.append(whole["trainer"])
        found += [
            callback["init_args"] for callback in whole["trainer"].get("callbacks", []) if "init_args" in callback
        ]
    return [(whole, place) for place in found]


def test_the_papers_setting(stop_after_parsing: list[Any]) -> None:
    with pytest.raises(ParsedError):
        main(["fit", "--config", str(FOLDER / "pretrain_mixtral_8x7b.yaml")])
    arguments = stop_after_parsing[0].model.init_args
    lora = arguments.lora.init_args
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (64, 128, 0.05)
    assert len(lora.target_modules) == 8
    assert arguments.optimizer.init_args.lr == 1e-4
    assert arguments.lr_scheduler.init_args.warmup_fraction == 0.05
    assert arguments.train_embeddings is True
    settle_tokenizer(stop_after_parsing[0])
    assert stop_after_parsing[0].data.init_args.tokenizer == arguments.base
