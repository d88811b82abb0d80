"""Output that is whole or not there."""

import errno
import json
from pathlib import Path

import pytest

from lightning_mixcn.files import atomic
from lightning_mixcn.files.atomic import (
    move_into_place,
    new_file,
    new_folder,
    remove_leftovers,
    remove_path,
    replace_link,
    unfinished_path,
    write_json,
    write_text,
)


def tree(folder: Path) -> list[str]:
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "第二"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert tree(path.parent) == ["file.txt"]


def test_json_is_written_as_readable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "中", "a": [1]}, sort_keys=True)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": [\n    1\n  ],\n  "b": "中"\n}\n'
    assert json.loads(text) == {"a": [1], "b": "中"}


def test_a_new_file_keeps_its_suffix_while_it_is_written(tmp_path: Path) -> None:
    with new_file(tmp_path / "a.png") as unfinished:
        assert (unfinished.name[0], unfinished.suffix) == (".", ".png")
        unfinished.touch()
    assert tree(tmp_path) == ["a.png"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "a").mkdir()
    with (
        pytest.raises(FileExistsError, match="is a folder, expected a new file"),
        new_file(tmp_path / "a", replace=replace),
    ):
        pass


def test_a_file_that_is_there_is_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    def race() -> None:
        with new_file(tmp_path / "a") as unfinished:
            unfinished.write_text("ours")
            (tmp_path / "a").write_text("mine")

    for attempt in (race, race):  # at the end, and at the beginning
        with pytest.raises(FileExistsError, match="is a file, expected a new one"):
            attempt()
    assert tree(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "mine"


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with new_folder(tmp_path / "folder", replace=True) as folder:
            (folder / name).touch()
        assert tree(tmp_path) == ["folder", f"folder/{name}"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a").touch()

    def fail() -> None:
        with new_folder(tmp_path / "folder", replace=True) as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(tmp_path) == ["folder", "folder/a"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    for left in (".folder.partial-12345678", ".folder.outdated"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").touch()
    (tmp_path / "folder").mkdir()
    with new_folder(tmp_path / "folder", replace=True) as folder:
        assert not list(folder.iterdir())
    assert tree(tmp_path) == ["folder"]


def test_leftovers_are_removed_from_a_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.unfinished").mkdir()
    (tmp_path / ".a.unfinished" / "half").touch()
    kept = [".e", ".f.partial-export", ".g.partial-12345678", "d"]
    (tmp_path / ".g.partial-12345678").mkdir()  # a folder that another process may be filling
    for name in (".b.partial-12345678.txt", ".c.outdated", *kept):
        if not (tmp_path / name).exists():
            (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == kept


def test_a_full_disk_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with new_folder(tmp_path / "folder") as folder:
            write_text(folder / "a", "text")

    monkeypatch.setattr(atomic, "flush_to_disk", full)
    expected = "no space to write '.*/folder': No space left on device. Free some space or choose another disk$"
    with pytest.raises(OSError, match=expected):
        write()
    assert tree(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError, match=r"/a'$"):
        write_text(tmp_path / "a" / "b", "text")


def test_what_several_processes_wrote_gets_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    unfinished_path(path).write_text("file")
    move_into_place(unfinished_path(path), path)
    unfinished_path(path).mkdir()
    move_into_place(unfinished_path(path), path)
    assert path.is_dir()
    remove_path(path)
    assert tree(tmp_path) == []


def test_a_link_changes_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
        replace_link(tmp_path / "last", tmp_path / name)
        assert (tmp_path / "last").readlink() == Path(name)
