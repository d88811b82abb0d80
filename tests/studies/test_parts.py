"""Parts of a study: kept whole or not at all, and for the same study only."""

from pathlib import Path

import numpy as np
import pytest

from lightning_mixcn.studies.parts import StudyParts


def test_parts_are_found_again(tmp_path: Path) -> None:
    parts = StudyParts(tmp_path / "deep" / "out", {"tokens": 3})
    parts.save("a", {"x": np.arange(3), "y": np.array(1.5)})
    again = StudyParts(tmp_path / "deep" / "out", {"tokens": 3})
    assert "a" in again
    assert "b" not in again
    assert again.load("a")["x"].tolist() == [0, 1, 2]
    assert float(again.load("a")["y"]) == 1.5
    again.delete()
    assert not list((tmp_path / "deep").iterdir())


def test_a_part_that_was_cut_off_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = StudyParts(tmp_path / "out", {})

    def torn(file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(KeyboardInterrupt):
        parts.save("a", {"x": np.arange(3)})
    monkeypatch.undo()
    again = StudyParts(tmp_path / "out", {})
    assert "a" not in again
    again.save("a", {"x": np.arange(3)})
    assert again.load("a")["x"].tolist() == [0, 1, 2]


def test_another_study_is_refused(tmp_path: Path) -> None:
    StudyParts(tmp_path / "out", {"tokens": 3, "mode": "mask"}).save("a", {})
    with pytest.raises(FileExistsError, match=r"holds a study with `tokens=3`, but now it is 4\. Give the former"):
        StudyParts(tmp_path / "out", {"tokens": 4, "mode": "mask"})


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        StudyParts(tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
