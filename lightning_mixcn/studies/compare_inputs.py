"""What a comparison depends on outside its recipe: is it there, and is it still the same?"""

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mixcn.model.hub import local_folder
from lightning_mixcn.text import ConversationSource, Source, parse_sources
from lightning_mixcn.text.files import is_url
from lightning_mixcn.text.listings import LeftOut, walk_files
from lightning_mixcn.text.sources import list_files

_SOURCES = ("sources", "val_sources")
_MODEL_PATHS = ("base", "tokenizer", "adapter")


def check_inputs(config: Mapping[str, Any], prepared: Path) -> None:
    """Check that base, tokenizer, adapter and text of a configuration are there; what will be prepared may come.

    Args:
        config: A whole configuration of `mixcn fit`.
        prepared: Folder of what will be prepared.

    Raises:
        FileNotFoundError: something is not there.
        ValueError: a source's files cannot be read.
    """
    for name, path in _model_paths(config):
        if name == "adapter" and Path(path).exists():  # a run's folder, which holds it
            continue
        if not _is_inside(path, prepared):
            local_folder(path)
    for argument in _SOURCES:
        entries = config["data"]["init_args"].get(argument) or []
        kind: Any = Source if all("text_key" in entry for entry in entries) else ConversationSource
        for index, source in enumerate(parse_sources(entries, argument, kind)):
            if not any(_is_inside(path, prepared) for path in _paths(source.path)):
                list_files(source, f"{argument}[{index}]")


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """Size and time of change of all local files that a configuration names, as a digest for each path."""
    texts = [entry["path"] for name in _SOURCES for entry in config["data"]["init_args"].get(name) or []]
    named = [path for _, path in _model_paths(config)] + [path for text in texts for path in _paths(text)]
    return files_fingerprint(named)


def files_fingerprint(paths: Sequence[str]) -> dict[str, str]:
    """The same of some paths, folders and globs; what is not there, or not on this machine, is left out."""
    found = {}
    for path in paths:
        if not is_url(path) and (files := sorted(_files(path))):
            digest = hashlib.sha256()
            for file in files:
                status = file.stat()
                digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            found[path] = digest.hexdigest()[:16]
    return found


def _files(path: str) -> Iterator[Path]:
    for match in glob.glob(str(Path(path).expanduser()), recursive=True):
        found = walk_files(Path(match), LeftOut(), hidden=True) if Path(match).is_dir() else [Path(match)]
        yield from (file for file in found if file.exists())


def _model_paths(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    arguments = config["model"]["init_args"]
    return [(name, str(arguments[name])) for name in _MODEL_PATHS if arguments.get(name)]


def _paths(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path


def _is_inside(path: str, folder: Path) -> bool:
    return Path(path).absolute().is_relative_to(folder.absolute())
