"""Filled-in sheets and their key as one table of verdicts.

Legend: J judges, I items.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mixcn.errors import MissingFileError, UserError

from .sheet import Item, read_sheet

KEY = "key.json"
LEFT, RIGHT, TIE, MISSING = 0, 1, 2, -1
_CODES = {"left": LEFT, "right": RIGHT, "tie": TIE, "": MISSING}


@dataclass(frozen=True)
class Matches:
    """What judges said of all items.

    Args:
        models: Names.
        judges: Names.
        items: Models on each side.
        verdicts: int8 ``[J, I]``: `LEFT`, `RIGHT`, `TIE`, or `MISSING`.
    """

    models: list[str]
    judges: list[str]
    items: list[Item]
    verdicts: NDArray[np.int8]


def read_matches(sheets: Sequence[str], key: str | None = None) -> Matches:
    """Read filled-in sheets.

    Args:
        sheets: One a judge.
        key: Their key.json; ``None``: beside the first sheet, see `place_of_key`.

    Raises:
        FileNotFoundError: no such sheet or key.
        ValueError: a sheet of another key, without a verdict, given twice, or what `read_sheet` refuses.
    """
    if not sheets:
        raise UserError("`sheets` is empty. Give at least one filled-in sheet")
    models, items = _read_key(sheets[0], key)
    places = {item.name: place for place, item in enumerate(items)}
    verdicts_JI = np.full((len(sheets), len(items)), MISSING, dtype=np.int8)
    for judge, path in enumerate(sheets):
        for found in read_sheet(path):
            if found.item not in places:
                raise UserError(
                    f"the sheet {path!r} row {found.row}: the item {found.item!r} is not in the key. Is it of another "
                    "sheet? Give the right `--key`"
                )
            verdicts_JI[judge, places[found.item]] = _CODES[found.verdict]
        if (verdicts_JI[judge] == MISSING).all():
            raise UserError(f"the sheet {path!r} has no verdict. Leave it out, or save it again when it is filled in")
    return Matches(models, _judges(sheets), items, verdicts_JI)


def place_of_key(first_sheet: str, key: str | None) -> Path:
    """Return the path of the key: the one that is named, or the one beside the first sheet."""
    return Path(key).expanduser() if key else Path(first_sheet).expanduser().parent / KEY


def _read_key(first_sheet: str, key: str | None) -> tuple[list[str], list[Item]]:
    path = place_of_key(first_sheet, key)
    if not path.is_file():
        raise MissingFileError(f"the key {str(path)!r} is no file. Give the sheets' {KEY} as `--key`")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return list(content["models"]), [Item(**item) for item in content["items"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"`key={str(path)!r}` is no key of `mixcn preference sheet` ({error!r})") from error


def _judges(sheets: Sequence[str]) -> list[str]:
    """Return file names without their ends, or whole paths where two are alike."""
    if twice := [path for place, path in enumerate(sheets) if path in sheets[:place]]:
        raise UserError(f"the sheet {twice[0]!r} is given twice. Leave one out")
    stems = [Path(path).stem for path in sheets]
    return stems if len(set(stems)) == len(stems) else list(sheets)
