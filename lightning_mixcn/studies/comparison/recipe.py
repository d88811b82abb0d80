"""What is compared with what: the recipes under ``configs/studies/``."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import yaml

from lightning_mixcn.arguments import Between, Name, Seed, check_arguments
from lightning_mixcn.errors import MissingFileError, UserError, did_you_mean, one_line
from lightning_mixcn.files.configuration import read_configuration

# Replaced in all values of a recipe by the folder of what `prepare` makes.
PREPARED = "{prepared}"

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "config": ((str, list), "the path of a configuration of `mixcn fit`, seen from the recipe, or a list of them"),
    "text_bytes": (int, "bytes of text that each run sees, e.g. 100_000_000"),
    "arms": (dict, "at least two names, each with the settings by which it differs"),
    "title": (str, "a line of text"),
    "train": (bool, "true, or false to validate the arms as they are"),
    "validations": (int, "a number of validations, 1 or more"),
    "seeds": (list, "whole numbers, e.g. [0, 1, 2]"),
    "settings": (dict, "settings that all runs share, e.g. {trainer.devices: 8}"),
    "needs": (dict, "paths that must be there, each with what makes it"),
    "prepare": (dict, "names of outputs, each with the `mixcn` command that makes it, as a list"),
    "evaluate": (list, "options of `mixcn evaluate`, e.g. [--tasks, ceval-valid]"),
    "quick": (dict, "values of the other keys for a run of minutes"),
}


class _Bounds(TypedDict, total=False):
    """Bounds of the values, checked after their kinds."""

    text_bytes: Annotated[int, Between(1, 10**15)]
    validations: Annotated[int, Between(1, 10**6)]
    seeds: list[Seed]
    needs: dict[Name, Name]


_REQUIRED = ("config", "text_bytes", "arms")
_OF_TRAINING = ("text_bytes", "validations", "seeds")
_NAME = re.compile(r"[^\W_][\w .+-]*")


@dataclass(frozen=True)
class Recipe:
    """A comparison.

    Args:
        config: Configurations of `mixcn fit` that all runs begin with, later ones over earlier ones.
        text_bytes: UTF-8 bytes of text that each run sees; 0 where nothing is trained.
        arms: Settings by which the runs differ, by name: dotted keys of the configuration, and values.
        title: Over table and figure.
        train: Train the arms; else they are validated once as they are.
        validations: Number of validations of each run on its way, the last one at its end.
        seeds: A run of each arm for each; it seeds adapters and the order of the text.
        settings: Settings that all runs share.
        needs: Paths that must be there before anything starts, and what makes each.
        prepare: Commands that make what the runs need, by the name of their output.
        evaluate: Options of `mixcn evaluate` on each finished run; empty for none.
    """

    config: tuple[str, ...]
    text_bytes: int
    arms: Mapping[str, Mapping[str, Any]]
    title: str = ""
    train: bool = True
    validations: int = 4
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    prepare: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evaluate: tuple[str, ...] = ()

    def options(self, arm: str, prepared: Path) -> list[str]:
        """Return options of `mixcn fit` and `mixcn validate` for an arm, shared ones first.

        Args:
            arm: Its name.
            prepared: Folder of what `prepare` made.
        """
        configs = [part for config in self.config for part in ("--config", config)]
        return configs + [
            f"--{key}={_filled(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), prepared)}"
            for key, value in {**self.settings, **self.arms[arm]}.items()
        ]

    def commands(self, prepared: Path) -> dict[str, list[str]]:
        """Return arguments of `mixcn` that make each output of `prepare`."""
        return {name: [_filled(part, prepared) for part in command] for name, command in self.prepare.items()}


def read_recipe(path: Path, quick: bool) -> Recipe:
    """Read a recipe and check all that can be checked without `mixcn` itself.

    Args:
        path: YAML file.
        quick: Let its ``quick`` values take the place of the others.

    Raises:
        FileNotFoundError: the recipe, its configuration or what it needs is not there.
        ValueError: something in it is not what it should be; names the key.
    """
    values = _read(path, quick)
    for name in _REQUIRED:
        if name not in values and (name not in _OF_TRAINING or values.get("train", True)):
            raise UserError(f"`recipe={str(path)!r}` has no `{name}`: expected {_KINDS[name][1]}")
    _check_values(path, values)
    for needed, maker in values.get("needs", {}).items():
        if not Path(needed).expanduser().exists():
            raise MissingFileError(f"{needed!r}, which {str(path)!r} needs, is not there. First run: {maker}")
    configs = [values["config"]] if isinstance(values["config"], str) else values["config"]
    values["config"] = tuple(_found(path, config) for config in configs)
    values["arms"] = {str(name): dict(arm or {}) for name, arm in values["arms"].items()}
    values["prepare"] = {str(name): tuple(map(str, command)) for name, command in values.get("prepare", {}).items()}
    values["seeds"] = tuple(values.get("seeds", (0,)))
    values.setdefault("text_bytes", 0)
    values["evaluate"] = tuple(map(str, values.get("evaluate", ())))
    return Recipe(**values | {"title": values.get("title", path.stem)})


def _read(path: Path, quick: bool) -> dict[str, Any]:
    """Return the values that hold."""
    if not path.is_file():
        raise MissingFileError(f"`recipe={str(path)!r}` is not there. Those of the project are under configs/studies/")
    text = read_configuration(path, f"recipe={str(path)!r}")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that is none, a number that is too long
        raise UserError(f"`recipe={str(path)!r}` is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"`recipe={str(path)!r}`: expected keys such as config, arms and text_bytes")
    if quick and "quick" not in content:
        raise UserError(f"`quick`: {str(path)!r} has no `quick` values. Leave the option out, or add them")
    _check_keys(path, content)
    shorter = content.pop("quick", {})
    _check_keys(path, shorter, "quick.")
    return content | (shorter if quick else {})


def _check_keys(path: Path, values: Mapping[Any, Any], inside: str = "") -> None:
    expected = [name for name in _KINDS if not (inside and name == "quick")]
    for name, value in values.items():
        if name not in expected:
            raise UserError(
                f"`{inside}{name}` of {str(path)!r} is no key of a recipe{did_you_mean(str(name), expected)}. Expected "
                f"one of {', '.join(expected)}"
            )
        kind, says = _KINDS[name]
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise UserError(f"`{inside}{name}` of {str(path)!r}: expected {says}, got {value!r}")


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    for name in ("text_bytes", "validations"):
        if values.get(name, 1) < 1:
            raise UserError(f"`{name}={values[name]}` of {str(path)!r}: expected {_KINDS[name][1]}")
    seeds = values.get("seeds", [0])
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"`seeds={seeds}` of {str(path)!r}: expected {_KINDS['seeds'][1]}, each once")
    check_arguments(_Bounds, values, f"{path}: ")
    if not values.get("train", True) and (useless := [name for name in _OF_TRAINING if name in values]):
        raise UserError(
            f"{str(path)!r} has `train: false`, to which `{useless[0]}` means nothing. Leave one of them out"
        )
    arms = values["arms"]
    if len(arms) < 2 or not all(arm is None or isinstance(arm, dict) for arm in arms.values()):
        raise UserError(f"`arms` of {str(path)!r}: expected {_KINDS['arms'][1]}")
    for name in (*arms, *values.get("prepare", {})):  # they become names of folders
        if not _NAME.fullmatch(str(name)):
            raise UserError(f"{str(path)!r}: {name!r} is no name. Expected letters, digits, blanks and - _ . +")
    for name, command in values.get("prepare", {}).items():
        if not isinstance(command, list) or not command:
            raise UserError(f"`prepare` of {str(path)!r}: {name!r} has no command: expected e.g. [vocab, train, …]")


def _found(path: Path, config: Any) -> str:
    file = (path.parent / str(config)).resolve()
    if not file.is_file():
        raise MissingFileError(f"`config={config!r}` of {str(path)!r} is not there: {file}")
    return str(file)


def _filled(text: str, prepared: Path) -> str:
    return text.replace(PREPARED, str(prepared))
