"""Record in a file which base something was made from: PEFT's own configuration has a path, but no content."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import InUseError, UserError
from lightning_mixcn.files.atomic import remove_leftovers, write_json, write_text
from lightning_mixcn.files.hub import cache_root, public_name
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import TEXT, record

from .folder import Checkpoint, recorded_path

IDENTITY_FILE = "base_identity.json"
QUANTIZATION_METHOD = "mixcn_nf4"
# Before the family's name. Not that alone with a ``quant_method``: transformers skips a method that it does not know
# with a warning, and goes on with random weights. It refuses an unknown type of model (Auto classes) and a method
# without a name (the others).
QUANTISED_PREFIX = "mixcn_nf4_"
_KEYS = ("path", "sha256")
_ORIGINAL_KEYS = ("original_path", "original_sha256")
_PATHS = dict((_KEYS, _ORIGINAL_KEYS))
_STRUCTURE = record(dict.fromkeys(_KEYS, TEXT), dict.fromkeys(_ORIGINAL_KEYS, TEXT))


def base_identity(base: Checkpoint) -> dict[str, str]:
    """Return what identifies a base: its ``path`` (see `recorded_path`) and the ``sha256`` of its content.

    The hash covers the configuration, every tensor's name, shape and type, and a sample of the content, so it takes
    seconds for any size. A 4-bit folder that records what it was made from has ``original_path`` and
    ``original_sha256`` of that, too.
    """
    identity = {"path": base.name, "sha256": base.sha256}
    original = read_identity(base.path)
    if original is not None:
        identity |= {"original_path": recorded_path(original["path"]), "original_sha256": original["sha256"]}
    return identity


def is_own_format(config: Mapping[str, Any]) -> bool:
    """Tell whether the content of a ``config.json`` is that of a 4-bit folder of `mixcn quantize`."""
    if str(config.get("model_type")).startswith(QUANTISED_PREFIX):
        return True
    # Folders that were written before there was such a type name the method.
    return bool((config.get("quantization_config") or {}).get("quant_method") == QUANTIZATION_METHOD)


def stock_base(base: Checkpoint) -> str | None:
    """Return the name of a base for tools that cannot read the 4-bit folders of `mixcn quantize`.

    Args:
        base: The base. Of such a 4-bit folder, what it was made from is named.

    Returns:
        See `recorded_path`; ``None`` where a 4-bit folder does not record its original.
    """
    if not is_own_format(base.config):
        return base.name
    original = read_identity(base.path)
    return None if original is None else recorded_path(original["path"])


def write_identity(folder: Path, identity: dict[str, str]) -> None:
    """Write ``base_identity.json``, which names bases without their paths: these stay in this machine's cache folder.

    Args:
        folder: Folder of the adapter, or of the 4-bit model.
        identity: ``path`` and ``sha256`` of the base, see `base_identity`.
    """
    named = dict(identity)
    for key, digest in _PATHS.items():
        if key in identity:
            named[key] = public_name(identity[key])
            if Path(identity[key]).is_dir():
                note, place = _note(named[key], identity[digest]), os.path.abspath(identity[key])
                # Another run notes the same, or no cache folder can be written: a person then says where the base is.
                with suppress(OSError, InUseError):
                    note.parent.mkdir(parents=True, exist_ok=True)
                    if not note.is_file() or note.read_bytes() != os.fsencode(place):
                        write_text(note, place)
                    else:  # no further writing of it removes what a kill left beside it
                        remove_leftovers(note.parent, re.escape(note.name))
    write_json(folder / IDENTITY_FILE, named)


def _note(name: str, digest: str) -> Path:
    """Get the file that says where the base of this name and content is on this machine."""
    return cache_root() / "bases" / Path(digest).name / Path(name).name


def _located(name: str, digest: str) -> str:
    """Return the place of a base on this machine if it is known, else its name."""
    if not Path(name).is_absolute():
        with suppress(OSError, ValueError):  # none, or another person's, in a cache folder that is shared
            place = _note(name, digest).read_text(encoding="utf-8")
            return place if Path(place).is_dir() else name
    return name


def read_identity(folder: Path) -> dict[str, str] | None:
    """Read what `write_identity` wrote into a folder; ``None`` where it did not.

    Raises:
        ValueError: the file is broken.
    """
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return None
    content = read_object(file, _STRUCTURE, remedy="Copy it again, or delete it")
    identity = {key: content[key] for key in (*_KEYS, *_ORIGINAL_KEYS) if key in content}
    known = [(key, digest) for key, digest in _PATHS.items() if key in identity and digest in identity]
    return identity | {key: _located(identity[key], identity[digest]) for key, digest in known}


def check_made_from(folder: Path, base: Checkpoint) -> None:
    """Check that what is in a folder was made from a base; its folder may have moved.

    A 4-bit base counts as the base that it was quantised from, and that base as its 4 bits.

    Args:
        folder: With ``base_identity.json``; without it there is nothing to check.
        base: The base.

    Raises:
        ValueError: it is another base.
    """
    recorded = read_identity(folder)
    if recorded is None:
        return
    original = read_identity(base.path)
    accepted = {base.sha256, original["sha256"] if original else base.sha256}
    if accepted.isdisjoint((recorded["sha256"], recorded.get("original_sha256"))):
        raise UserError(
            f"{str(folder)!r} was made from the base {recorded['path']} (sha256 {recorded['sha256'][:12]}…), but "
            f"{base.name} is another one (sha256 {base.sha256[:12]}…). Give the former, or move it back to its place"
        )
