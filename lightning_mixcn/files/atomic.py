"""Write output that appears under its name only when it is whole.

All output of this package goes to a hidden name beside its own, is flushed to the disk and renamed. A process that is
killed leaves at most something hidden.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import ExistingFileError


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a hidden folder, which becomes ``out`` at the end; after an error or Ctrl-C nothing is left.

    Args:
        out: Folder to make; it may exist if it is empty.
        replace: Take the place of a folder that is there. It then has one writer: what a killed one left is removed.

    Yields:
        The hidden folder, empty.

    Raises:
        FileExistsError: ``out`` is a file or a folder that is not empty, and ``replace`` is not given.
        OSError: the disk is full, or cannot be written.
    """
    if replace and out.parent.is_dir():
        leftover = re.compile(rf"\.{re.escape(out.stem)}\.partial-[0-9a-f]+{re.escape(out.suffix)}")
        for path in out.parent.iterdir():
            if leftover.fullmatch(path.name):
                _delete(path)
    elif not replace:
        check_output(out)
    folder = _partial_path(out)
    try:
        with _naming_full_disk(out):
            folder.mkdir(parents=True)
            yield folder
            for path in folder.rglob("*"):
                flush_to_disk(path)
            if replace:
                move_into_place(folder, out)
            else:
                flush_to_disk(folder)
                check_output(out)
                folder.rename(out)  # onto an empty folder at most
                flush_to_disk(out.parent)
    finally:
        _delete(folder)


@contextmanager
def new_file(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a hidden file, which becomes ``out`` at the end; after an error or Ctrl-C nothing is left.

    Args:
        out: File to make; its folder is made if need be.
        replace: Take the place of a file that is there, in one step.

    Yields:
        The hidden file's path, with the same suffix; nothing is there yet.

    Raises:
        FileExistsError: ``out`` is a folder, or a file and ``replace`` is not given.
        OSError: the disk is full, or cannot be written.
    """
    if not replace or out.is_dir():
        check_file(out)
    unfinished = _partial_path(out)
    with _naming_full_disk(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            if not replace:
                check_file(out)
            move_into_place(unfinished, out)
        finally:
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8, replacing one that is there in one step; its folder is made if need be."""
    with new_file(path, replace=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, indent: int = 2, sort_keys: bool = False) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent, sort_keys=sort_keys) + "\n")


def check_output(out: Path) -> None:
    """Raise FileExistsError unless a folder can be made (absent, or an empty folder)."""
    if out.is_dir() and any(out.iterdir()):
        raise ExistingFileError(f"{str(out)!r} is a folder that is not empty. Delete it or choose another output")
    if out.exists() and not out.is_dir():
        raise ExistingFileError(f"{str(out)!r} is a file, expected a new folder. Delete it or choose another output")


def check_file(out: Path) -> None:
    """Raise FileExistsError unless a file of this name can be made."""
    if out.is_dir():
        raise ExistingFileError(f"{str(out)!r} is a folder, expected a new file. Give the name of a file in it")
    if out.exists():
        raise ExistingFileError(f"{str(out)!r} is a file, expected a new one. Delete it or choose another output")


def unfinished_path(path: Path) -> Path:
    """Return the hidden name for output that several processes write together; see `move_into_place`."""
    return path.with_name(f".{path.name}.unfinished")


def move_into_place(unfinished: Path, path: Path) -> None:
    """Give a complete file or folder its name.

    What has the name is replaced: a file in one step, a folder in two, between which there is none.

    Args:
        unfinished: Hidden file or folder; the files in a folder are flushed to the disk already.
        path: Its name beside it.
    """
    flush_to_disk(unfinished)
    outdated = _outdated_path(path)
    if path.is_dir() or (path.exists() and unfinished.is_dir()):
        _delete(outdated)  # of a killed process
        path.rename(outdated)
    unfinished.replace(path)
    flush_to_disk(path.parent)
    _delete(outdated)


def replace_link(link: Path, target: Path) -> None:
    """Have a symbolic link point to a file or folder, changing one that is there in one step."""
    unfinished = unfinished_path(link)
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(os.path.relpath(target, link.parent))
    unfinished.replace(link)


def remove_path(path: Path) -> None:
    """Remove a file or folder; a kill never leaves half a folder under its name."""
    if path.is_dir() and not path.is_symlink():
        outdated = _outdated_path(path)
        path.rename(outdated)
        path = outdated
    _delete(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written or half removed in a folder.

    Folders of `new_folder` stay: another process may be filling one.
    """
    for path in folder.glob(".*"):
        left = re.fullmatch(r"\..+\.(?:unfinished|outdated|(partial-[0-9a-f]{8})(?:\.[^.]+)?)", path.name)
        if left and not (left[1] and path.is_dir()):
            _delete(path)


def _partial_path(out: Path) -> Path:
    return out.with_name(f".{out.stem}.partial-{secrets.token_hex(4)}{out.suffix}")


def _outdated_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.outdated")


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming_full_disk(out: Path) -> Iterator[None]:
    """Add the output's name, and what to do, to the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        detail = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.strerror  # of a file in it
        raise OSError(
            errno.ENOSPC, f"no space to write {str(out)!r}: {detail}. Free some space or choose another disk"
        ) from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
