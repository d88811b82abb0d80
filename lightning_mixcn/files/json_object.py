"""Read small JSON files, which a stranger may have written, whole and in bounds, or refuse them in one line.

Python's reader alone takes NaN, the last of two equal keys, and what is nested until it fails; a file that is read
whole may also be larger than memory.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import MissingFileError, UserError, one_line

from .schema import Check, first_fault

# The index of a thousand shards has 10 MB, the tokenizer.json of a quarter of a million pieces 35.
LARGEST_JSON_BYTES = 128 * 2**20
_DEEPEST = 64  # levels; that of a tokenizer's chain of normalisers has ten


def read_object(file: Path, check: Check | None = None, *, remedy: str = "Copy or download it again") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        file: The file.
        check: Structure that is expected.
        remedy: Advice for the message.

    Returns:
        The object.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is too large, nested too deeply, no JSON, no object, or has another structure; the message names
            file and key.
    """
    if not file.is_file():
        raise MissingFileError(f"{str(file)!r} is not there. {remedy}")
    if (size := file.stat().st_size) > LARGEST_JSON_BYTES:
        raise UserError(f"{str(file)!r} has {size:,} bytes, expected at most {LARGEST_JSON_BYTES:,}. {remedy}")
    return parse_object(file.read_bytes(), repr(str(file)), check, remedy=remedy)


def parse_object(
    content: bytes, where: str, check: Check | None = None, *, remedy: str = "Copy or download it again"
) -> dict[str, Any]:
    """Read the bytes of a JSON object.

    Args:
        content: UTF-8.
        where: Name of what holds them, for messages.
        check: Structure that is expected.
        remedy: Advice for the message.

    Raises:
        ValueError: as `read_object`.
    """
    try:
        text = content.decode()
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        _check_depth(found)
        if "\\ud" in text.lower():  # half a surrogate pair could not be written out again
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON (it is nested too deeply). {remedy}") from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({one_line(error)}). {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} holds a JSON {type(found).__name__}, expected an object. {remedy}")
    if check is not None and (fault := first_fault(found, check)):
        raise UserError(f"{where}: {fault}. {remedy}")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
