"""Sheets and key put together."""

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_mixcn.studies.preference.matches import read_matches
from lightning_mixcn.studies.preference.sheet import Item

ITEMS = [Item("p-1", 0, 0, 1), Item("p-2", 1, 1, 0), Item("p-3", 2, 0, 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    key = {"sheet": "p", "models": ["a", "b"], "items": [item._asdict() for item in ITEMS]}
    (tmp_path / "key.json").write_text(json.dumps(key), encoding="utf-8")
    return tmp_path


def sheet(path: Path, **verdicts: str) -> str:
    path.parent.mkdir(exist_ok=True)
    lines = (f"{item.replace('_', '-')},{verdict}\n" for item, verdict in verdicts.items())
    path.write_text("item,verdict\n" + "".join(lines), encoding="utf-8")
    return str(path)


def test_verdicts_by_judge_and_item(folder: Path) -> None:
    sheets = [sheet(folder / "anna.csv", p_3="left", p_1="tie", p_2=""), sheet(folder / "bo.csv", p_2="right")]
    found = read_matches(sheets)
    assert (found.models, found.judges, found.items) == (["a", "b"], ["anna", "bo"], ITEMS)
    np.testing.assert_array_equal(found.verdicts, [[2, -1, 0], [-1, 1, -1]])


def test_judges_of_one_name_go_by_their_paths(folder: Path) -> None:
    sheets = [sheet(folder / name / "sheet.csv", p_1="left") for name in ("x", "y")]
    assert read_matches(sheets, str(folder / "key.json")).judges == sheets


def test_what_is_refused(folder: Path) -> None:
    good = sheet(folder / "good.csv", p_1="left")
    for sheets, message in (
        ([], "`sheets` is empty"),
        ([good, good], "given twice"),
        ([sheet(folder / "empty.csv", p_1="")], "has no verdict"),
        ([good, sheet(folder / "other.csv", p_1="left", q_1="left")], "row 3: the item 'q-1' is not in the key"),
        ([sheet(folder / "odd.csv", p_1="maybe")], "row 2: the verdict 'maybe' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            read_matches(sheets)
    elsewhere = sheet(folder / "x" / "a.csv", p_1="left")
    with pytest.raises(FileNotFoundError, match="Give the sheets' key"):
        read_matches([elsewhere])
    (folder / "x" / "key.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is no key of `mixcn preference sheet`"):
        read_matches([elsewhere])
