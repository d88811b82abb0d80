"""Classes read from their source: what `inspect` and jsonargparse say of the class itself."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import peft
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

import lightning_mixcn
import lightning_mixcn.callbacks
import lightning_mixcn.data
import lightning_mixcn.modules
from lightning_mixcn.commands.classes import (
    Argument,
    arguments_of,
    base_names,
    documentation,
    exported_names,
    find_class,
    mentioned_classes,
)
from lightning_mixcn.errors import UserError
from lightning_mixcn.model.lora.choice import TrainOnly
from lightning_mixcn.text import Source

OURS = [
    f"{package.__name__}.{name}"
    for package in (lightning_mixcn, lightning_mixcn.callbacks, lightning_mixcn.modules, lightning_mixcn.data)
    for name in package.__all__
    if inspect.isclass(getattr(package, name))
]


def arguments(path: str) -> list[Argument]:
    found = find_class(path)
    assert found is not None
    return arguments_of(found)


def imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    kind: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)
    return kind


@pytest.mark.parametrize("path", OURS)
def test_arguments_are_those_that_jsonargparse_takes(path: str) -> None:
    """It follows `**kwargs` to the bases, too; without `fail_untyped` it takes Lightning's own untyped ones."""
    parser = ArgumentParser()
    parser.add_class_arguments(imported(path), "kind", fail_untyped=False)
    taken = {action.dest.removeprefix("kind.") for action in parser._actions if action.dest.startswith("kind.")}
    named = {argument.name for argument in arguments(path)}
    assert bool(taken) == bool(named)
    assert named - {"kwargs"} >= {name for name in taken if "." not in name and not name.endswith("help")}
    assert named <= {name.partition(".")[0] for name in taken} | {"optimizer"}  # jsonargparse leaves out what it links


@pytest.mark.parametrize("path", OURS)
def test_each_argument_of_ours_is_explained(path: str) -> None:
    assert not [each.name for each in arguments(path) if not each.about]


@pytest.mark.parametrize("kind", [Trainer, torch.optim.AdamW, EarlyStopping])
def test_names_and_needs_are_those_of_the_signature(kind: type) -> None:
    parameters = inspect.signature(kind).parameters
    read = arguments(f"{kind.__module__}.{kind.__name__}")
    assert [each.name for each in read] == list(parameters)
    assert [each.default is None for each in read] == [each.default is each.empty for each in parameters.values()]
    assert all(each.about for each in read)


def test_fields_of_a_dataclass_and_of_a_mapping() -> None:
    assert [each.name for each in arguments("lightning_mixcn.text.Source")] == [each.name for each in fields(Source)]
    lora = {each.name: each for each in arguments("peft.LoraConfig")}
    assert lora.keys() == {field.name for field in fields(peft.LoraConfig) if field.init}
    assert (lora["r"].default, lora["r"].kind, lora["r"].about) == ("8", "int", "Lora attention dimension")
    choice = arguments("lightning_mixcn.model.lora.choice.TrainOnly")
    assert [each.name for each in choice] == list(get_type_hints(TrainOnly))
    assert {each.default for each in choice} == {"absent"}


def test_types_are_written_without_this_package_s_aliases() -> None:
    read = {each.name: each for each in arguments("lightning_mixcn.PretrainModule")}
    assert read["base"] == Argument(
        "base", "str", None, "Hugging Face folder, 4-bit folder of `mixcn quantize`, or hub id."
    )
    assert (read["quantization"].kind, read["quantization"].default) == ("'nf4' | 'none'", "nf4")
    assert (read["lora"].kind, read["lora"].default) == ("LoraConfig | null", "null")
    assert read["activation_memory"].kind == "int | 'auto' | null"
    found = find_class("lightning_mixcn.PretrainModule")
    assert found is not None
    assert found.module == "lightning_mixcn.modules.pretrain"
    assert {"LoraConfig", "TrainOnly", "KLToBase"} <= set(mentioned_classes(found))
    assert "LightningModule" in base_names(found)


def test_a_docstring_that_is_assigned_below_the_class() -> None:
    found = find_class("torch.optim.AdamW")
    assert found is not None
    assert (documentation(found).short_description or "").startswith("Implements AdamW algorithm")
    assert "math" not in (documentation(found).long_description or "")


def test_a_module_in_the_folder_one_works_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    Path(tmp_path, "own_part").mkdir()
    Path(tmp_path, "own_part", "__init__.py").write_text("from .inner import *\nraise RuntimeError('imported')\n")
    Path(tmp_path, "own_part", "inner.py").write_text(
        "try:\n    import nothing\nexcept ImportError:\n    class Kind(dict):\n        '''Do.'''\n"
        "        def __init__(self, a, *, b: int = 3): ...\n"
    )
    found = find_class("own_part.Kind")
    assert found is not None
    assert arguments_of(found) == [Argument("a", "", None, ""), Argument("b", "int", "3", "")]
    assert documentation(found).short_description == "Do."
    Path(tmp_path, "own_broken.py").write_text("class Kind(\n")
    with pytest.raises(UserError, match=r"`own_broken.Kind` cannot be read: .* Mend the module"):
        find_class("own_broken.Kind")


@pytest.mark.parametrize("path", ["Kind", "", ".", "no.such.Kind", "json.no", "builtins.dict", "torch.", "..Kind"])
def test_what_is_not_there_is_none(path: str) -> None:
    assert find_class(path) is None


def test_exported_names() -> None:
    assert set(exported_names("lightning_mixcn.callbacks")) == set(lightning_mixcn.callbacks.__all__)
    assert exported_names("no.such.package") == []
