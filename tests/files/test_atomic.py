"""Output that is whole or not there."""

import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_mixcn.files import atomic
from lightning_mixcn.files.atomic import (
    append_lines,
    keep_lines,
    move_into_place,
    new_file,
    new_folder,
    owned,
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


def test_lines_follow_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    append_lines(path, ["一\n", "2\n"])
    append_lines(path, ["3\n"])
    assert path.read_text(encoding="utf-8") == "一\n2\n3\n"
    for half in ("半".encode()[:2], b"half", b"\x00" * 5000):
        with path.open("ab") as file:  # as a kill leaves it
            file.write(half)
        append_lines(path, ["4\n"])
        assert path.read_text(encoding="utf-8") == "一\n2\n3\n4\n"
        path.write_bytes(path.read_bytes()[:-2])
    path.write_bytes(b"half of the only one")
    append_lines(path, ["1\n"])
    assert path.read_bytes() == b"1\n"


def test_lines_that_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines.csv"
    keep_lines(path, lambda line: True, "header\n")
    assert path.read_bytes() == b"header\n"
    path.write_bytes("header\n一\u2028\n2\n三\n半".encode()[:-1])
    keep_lines(path, lambda line: line != "2\n", "header\n")
    assert path.read_text(encoding="utf-8") == "header\n一\u2028\n三\n"
    keep_lines(path, lambda line: line == "三\n")
    assert path.read_text(encoding="utf-8") == "三\n"


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


OURS = ("mark", "part-*")


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_a_folder_of_ours_is_replaced(tmp_path: Path) -> None:
    for name in ("part-a", "part-b"):
        with new_folder(tmp_path / "folder", replace=OURS) as folder:
            fill(folder, "mark", name)
        assert tree(tmp_path) == ["folder", "folder/mark", f"folder/{name}"]


def test_what_else_is_in_a_folder_of_ours_is_kept(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "mark", "part-a")
    fill(tmp_path / "folder" / "more", "thesis.txt")
    with new_folder(tmp_path / "folder", replace=OURS) as folder:
        fill(folder, "mark")
    assert tree(tmp_path) == ["folder", "folder/mark", "folder/more", "folder/more/thesis.txt"]


def test_what_is_kept_is_on_the_disk_before_the_old_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "folder", "mark")
    fill(tmp_path / "folder" / "more", "thesis.txt")
    (tmp_path / "folder" / "nowhere").symlink_to("gone")
    flushed, flush = list[str](), atomic.flush_to_disk

    def keep(path: Path) -> None:
        assert (tmp_path / "folder").exists() or (tmp_path / ".folder.outdated").exists()
        flushed.append(path.name)
        flush(path)

    monkeypatch.setattr(atomic, "flush_to_disk", keep)
    with new_folder(tmp_path / "folder", replace=OURS) as folder:
        fill(folder, "mark")
    assert {"more", "thesis.txt"} <= set(flushed)
    assert (tmp_path / "folder" / "nowhere").is_symlink()


def test_another_folder_is_never_replaced_nor_removed(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "thesis.txt")
    fill(tmp_path / "new", "mark")

    def make() -> None:
        with new_folder(tmp_path / "folder", replace=OURS) as folder:
            fill(folder, "mark")

    attempts = (make, lambda: move_into_place(tmp_path / "new", tmp_path / "folder", OURS))
    for attempt in (*attempts, lambda: remove_path(tmp_path / "folder", "mark")):
        with pytest.raises(FileExistsError, match=r"it has no mark\. Move it away"):
            attempt()
    assert tree(tmp_path) == ["folder", "folder/thesis.txt", "new", "new/mark"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("thesis")
    with pytest.raises(FileExistsError, match="is a file"), new_folder(tmp_path / "folder", replace=OURS):
        pass
    assert (tmp_path / "folder").read_text() == "thesis"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "mark")

    def fail() -> None:
        with new_folder(tmp_path / "folder", replace=OURS) as folder:
            fill(folder, "part-half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(tmp_path) == ["folder", "folder/mark"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    fill(tmp_path / ".folder.partial", "half")
    fill(tmp_path / ".folder.outdated", "half")
    fill(tmp_path / "folder", "mark")
    (tmp_path / ".folder.lock").write_text("process 1 on another machine")
    with new_folder(tmp_path / "folder", replace=OURS) as folder:
        assert not list(folder.iterdir())
        fill(folder, "mark")
    assert tree(tmp_path) == ["folder", "folder/mark"]


def test_a_kill_between_the_steps_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path / ".folder.outdated", "mark")
    fill(tmp_path / ".folder.partial", "mark")
    with owned(tmp_path / "folder"):
        pass
    assert tree(tmp_path) == ["folder", "folder/mark"]


def test_leftovers_are_removed_from_a_folder_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / ".a.unfinished", "half")
    fill(tmp_path / ".g.partial", "half")
    kept = [".c.partial.x.txt", ".e", ".h.outdated", ".k.partial", ".k.partial/half", "d"]
    fill(tmp_path / ".k.partial", "half")
    fill(tmp_path, ".b.partial.txt", ".c.removed", ".c.lock", "d", ".e", ".h.outdated", ".c.partial.x.txt")
    with owned(tmp_path / "k"):
        fill(tmp_path / ".k.partial", "half")
        child = os.fork()
        if child == 0:  # another process, which does not hold the lock
            remove_leftovers(tmp_path, r"[a-gk]|b\.txt")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert tree(tmp_path) == kept


def in_another_process(work: Callable[[], None]) -> str:
    """Return the error of a function that another process calls."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            answer = ""
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answers:
        return answers.read()


def test_an_output_has_one_writer_at_a_time(tmp_path: Path) -> None:
    def write() -> None:
        with new_file(tmp_path / "a") as unfinished:
            unfinished.touch()

    with owned(tmp_path / "a"), owned(tmp_path / "a"):  # in one process as often as one likes
        found = in_another_process(write)
    expected = f"InUseError: '{tmp_path}/a' is being written by process {os.getpid()} on {socket.gethostname()}. Wait"
    assert found.startswith(expected)
    assert tree(tmp_path) == []
    assert in_another_process(write) == ""
    assert tree(tmp_path) == ["a"]


def test_a_forked_process_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    with owned(tmp_path / "a"):
        child = os.fork()  # such as a loader's worker, which outlives the kill of its parent
        if child == 0:
            time.sleep(30)
            os._exit(0)
    with owned(tmp_path / "a"):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for text in ("first", "second"):
        write_text(tmp_path / "a", text)
    assert tree(tmp_path) == ["a"]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} is on a file system without locks: see that no second process writes there"
    ]


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with new_file(tmp_path / "new" / "folder" / "a"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(tmp_path) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_names_the_output(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"/a' cannot be written: Permission denied. Choose another output"):
        write_text(tmp_path / "a", "text")


def test_the_top_of_a_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not renamed, and where it lies cannot be written: by root, in this test, neither can be tried."""
    top = tmp_path / "disk"
    top.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == top)
    with owned(top):
        assert tree(tmp_path) == ["disk", "disk/.disk.lock"]
    assert tree(tmp_path) == ["disk"]
    with (
        pytest.raises(FileExistsError, match="is the top of a file system, with no room"),
        new_folder(top),
    ):
        pass
    with new_folder(top / "in it"):
        pass
    assert tree(tmp_path) == ["disk", "disk/in it"]


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
    assert path.is_file()
    remove_path(path)
    fill(unfinished_path(path), "mark")
    move_into_place(unfinished_path(path), path)
    assert path.is_dir()
    remove_path(path, "mark")
    assert tree(tmp_path) == []


def test_a_link_changes_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
        replace_link(tmp_path / "last", tmp_path / name)
        assert (tmp_path / "last").readlink() == Path(name)
