from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.studies.comparison.recipe import Recipe, read_recipe

CONTENT: dict[str, Any] = {
    "config": "run.yaml",
    "text_bytes": 1_000,
    "settings": {"trainer.max_epochs": -1, "model.init_args.lora": None, "model.init_args.dtype": "float32"},
    "arms": {
        "base": None,
        "extended": {"model.init_args.tokenizer": "{prepared}/zh", "data.init_args.sources": [{"name": "中"}]},
    },
    "prepare": {"zh": ["vocab", "merge", "base", "zh.model", "--out", "{prepared}/zh", "--max_pieces", 40]},
    "evaluate": ["--limit", 10],
    "quick": {"text_bytes": 10, "settings": {"trainer.max_epochs": 1}, "seeds": [3, 4]},
}


def read(folder: Path, *, short: bool = False, **changes: Any) -> Recipe:
    (folder / "run.yaml").write_text("{}", encoding="utf-8")
    content = {name: value for name, value in (CONTENT | changes).items() if value != "none"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return read_recipe(folder / "recipe.yaml", quick=short)


def test_a_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert (recipe.text_bytes, recipe.seeds, recipe.validations, recipe.title) == (1_000, (0,), 4, "recipe")
    assert recipe.evaluate == ("--limit", "10")
    config = ["--config", str((tmp_path / "run.yaml").resolve())]
    shared = ["--trainer.max_epochs=-1", "--model.init_args.lora=null", "--model.init_args.dtype=float32"]
    assert recipe.options("base", Path("made")) == [*config, *shared]
    assert recipe.options("extended", Path("made"))[-2:] == [
        "--model.init_args.tokenizer=made/zh", '--data.init_args.sources=[{"name": "中"}]'
    ]  # fmt: skip
    assert recipe.commands(Path("made"))["zh"][4:] == ["--out", "made/zh", "--max_pieces", "40"]


def test_without_training_there_are_no_bytes_of_text(tmp_path: Path) -> None:
    recipe = read(tmp_path, train=False, text_bytes="none")
    assert (recipe.train, recipe.text_bytes, recipe.seeds) == (False, 0, (0,))
    assert read(tmp_path, train=True).train


def test_quick_values_take_the_place_of_the_others(tmp_path: Path) -> None:
    recipe = read(tmp_path, short=True)
    assert (recipe.text_bytes, recipe.seeds) == (10, (3, 4))
    assert recipe.options("base", tmp_path)[2:] == ["--trainer.max_epochs=1"]
    assert list(recipe.arms) == ["base", "extended"]


def test_several_configurations(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("{}", encoding="utf-8")
    options = read(tmp_path, config=["run.yaml", "more.yaml"]).options("base", tmp_path)
    assert [Path(option).name for option in options[:4]] == ["--config", "run.yaml", "--config", "more.yaml"]


def test_an_arm_has_the_last_word(tmp_path: Path) -> None:
    arms = {"short": {"trainer.max_epochs": 1}, "long": {}}
    assert read(tmp_path, arms=arms).options("short", tmp_path)[2] == "--trainer.max_epochs=1"


def test_what_is_needed_is_there(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    assert read(tmp_path, needs={str(tmp_path / "there"): "touch"}).needs
    with pytest.raises(FileNotFoundError, match=r"gone', which .* needs, is not there. First run: make demo"):
        read(tmp_path, needs={str(tmp_path / "gone"): "make demo"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arm": {}},
            r"`arm` of .* no key of a recipe \(did you mean 'arms'\?\). Expected one of config, text_bytes, arms",
        ),
        ({"quick": {"byte": 1}}, r"`quick.byte` of .* is no key"),
        ({"quick": {"quick": {}}}, r"`quick.quick` of .* is no key"),
        ({"text_bytes": "none"}, r"has no `text_bytes`: expected bytes of text"),
        ({"text_bytes": 1e8}, r"`text_bytes` of .*: expected bytes of text.*, got 100000000.0"),
        ({"text_bytes": 0}, r"`text_bytes=0`"),
        ({"validations": True}, r"`validations` of .*: expected a number of validations, 1 or more, got True"),
        ({"seeds": [0, 0]}, r"`seeds=\[0, 0\]` of .*each once"),
        ({"seeds": [{}]}, r"`seeds=\[{}\]`"),
        ({"needs": {7: "x"}}, r"recipe.yaml: needs\[7\]=7`: expected text"),
        ({"arms": {"one": {}}}, r"`arms` of .*: expected at least two names"),
        ({"arms": {"a": {}, "b": 3}}, r"`arms` of"),
        ({"arms": {"a": {}, "..": {}}}, r"'..' is no name"),
        ({"arms": {"a": {}, "b/c": {}}}, r"'b/c' is no name"),
        ({"prepare": {"x": "vocab train"}}, r"'x' has no command"),
        ({"train": 0}, r"`train` of .*: expected true, or false"),
        ({"train": False}, r"has `train: false`, to which `text_bytes` means nothing. Leave one of them out"),
        ({"train": False, "text_bytes": "none", "seeds": [0, 1]}, r"to which `seeds` means nothing"),
        ({"config": 3}, r"`config` of .*: expected the path of a configuration"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`config='other.yaml'` of .* is not there"):
        read(tmp_path, config="other.yaml")
    with pytest.raises(FileNotFoundError, match=r"`recipe='.*none.yaml'` is not there"):
        read_recipe(tmp_path / "none.yaml", quick=False)


@pytest.mark.parametrize("text", ["a: [", "- a", ""])
def test_files_that_are_no_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"`recipe='.*recipe.yaml'`"):
        read_recipe(tmp_path / "recipe.yaml", quick=False)


def test_quick_values_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`quick`: .* has no `quick` values"):
        read(tmp_path, short=True, quick="none")
