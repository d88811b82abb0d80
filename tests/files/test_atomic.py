"""Output that is whole or not there."""

from pathlib import Path

import pytest

from lightning_mixcn.files.atomic import replaced_folder, write_text


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "第二"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with replaced_folder(tmp_path / "folder") as folder:
            (folder / name).touch()
        assert [entry.name for entry in (tmp_path / "folder").iterdir()] == [name]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "folder") as folder:
        (folder / "a").touch()

    def fail() -> None:
        with replaced_folder(tmp_path / "folder") as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [str(entry.relative_to(tmp_path)) for entry in sorted(tmp_path.rglob("*"))] == ["folder", "folder/a"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".folder.unfinished").mkdir()
    (tmp_path / ".folder.unfinished" / "half").touch()
    with replaced_folder(tmp_path / "folder") as folder:
        assert not list(folder.iterdir())
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
