"""Parse the configurations of a run; no key of one is passed over, and no file of one is read unchecked."""

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import (  # type: ignore[attr-defined]  # its __all__ is computed
    ActionConfigFile,
    Namespace,
    get_loader,
    set_loader,
)
from lightning.pytorch.cli import LightningArgumentParser

from lightning_mixcn.errors import MissingFileError, UserError, did_you_mean
from lightning_mixcn.files.configuration import MOST_BYTES, check_yaml, read_configuration

from .configs import carried_configs

_load_yaml = get_loader("yaml")


def check_what_is_loaded() -> None:
    """Have jsonargparse check all YAML as `--config FILE`: `--trainer FILE`, a file named in another one, a pipe."""
    set_loader("yaml", _load_checked, (yaml.YAMLError,))
    # It has no setting for this.
    jsonargparse.Path.read_text = _read_bounded  # type: ignore[attr-defined, method-assign, assignment]


def _read_bounded(path: Any) -> str:
    """Read one byte more than `check_yaml` takes: a pipe, or what a URL sends, may have no end."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    return content if isinstance(content, str) else content.decode()  # text where it comes from stdin


def _load_checked(text: str, path: str = "") -> Any:
    """Load YAML. A value that is no configuration may be any text: jsonargparse takes this error for that."""
    try:
        check_yaml(text, f"configuration {path}".strip())
    except UserError as error:
        raise yaml.YAMLError(str(error)) from error
    return _load_yaml(text)


class ConfigurationParser(LightningArgumentParser):
    """Parser that refuses every unknown key. jsonargparse makes the parsers of a configuration's classes from it, too.

    jsonargparse checks keys once it has merged what it was given into the defaults, where mappings without a value are
    gone.
    """

    def _apply_actions(self, cfg: Any, parent_key: str = "", *args: Any, **kwargs: Any) -> Any:
        """Refuse unknown keys whose value is an empty mapping, at the one place that sees all keys as they came."""
        empty = list(_empty_mappings(cfg, parent_key))
        # The parser of `mixcn` itself sees what those of its subcommands have checked.
        if empty and self._subcommands_action is None:
            # Without options that hold no value of their own: `--model.help`, and `--trainer FILE`.
            names = [f"{action.dest}." for action in self._actions if action.default != argparse.SUPPRESS]
            if unknown := next((key for key in empty if not _is_known(f"{key}.", names)), None):
                raise TypeError(f"Option '{unknown}' is not accepted")
        return super()._apply_actions(cfg, parent_key, *args, **kwargs)


def _is_known(key: str, names: list[str]) -> bool:
    """Tell whether a key is an argument or a group of some, or is inside of an argument, which checks it itself."""
    return any(name.startswith(key) or key.startswith(name) for name in names)


def _empty_mappings(value: Any, key: str) -> Iterator[str]:
    """Yield the keys below which there is no value, in jsonargparse's notation."""
    mapping = vars(value) if isinstance(value, Namespace) else value
    if not isinstance(mapping, Mapping):
        return
    if not mapping and key:
        yield key
    for name, inner in mapping.items():
        yield from _empty_mappings(inner, f"{key}.{name}" if key else str(name))


class ConfigOption(ActionConfigFile):
    """Reads a configuration by its path or by its name."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        """Find the file, and read it as jsonargparse does."""
        ActionConfigFile.apply_config(parser, cfg, dest, config_path(value))


def config_path(name: str) -> str:
    """Return the file of a configuration that is named on the command line.

    Args:
        name: Path, URL or content of a configuration, which is returned as it is; or, where there is no such file, the
            name of one that this package carries, such as ``demo``, ``trainer/fsdp2.yaml`` or ``configs/demo.yaml``.

    Raises:
        FileNotFoundError: neither a file nor such a name.
        ValueError: the file, or the content, is not YAML that can be used.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        read_configuration(Path(path), f"--config {name}")
    elif re.search(r"[{\n]", name):
        check_yaml(name, "--config")
    if re.search(r"[:{\n]", name) or (os.path.exists(path) and not os.path.isdir(path)):  # a pipe is no regular file
        return name
    carried = carried_configs()
    found = carried.get(name.removeprefix("configs/").removesuffix(".yaml"))
    if found is None:
        raise MissingFileError(
            f"`--config {name}` is no file, and no configuration of this package{did_you_mean(name, carried)}. Give a "
            f"path, or one of {', '.join(carried)}"
        )
    return str(found)
