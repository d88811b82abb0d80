"""Output that appears under its name only when it is whole, and a full disk that says so."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_mixcn.errors import ExistingFileError


def check_output(out: Path) -> None:
    """Raise FileExistsError unless ``out`` is free to be made (absent, or an empty folder)."""
    if out.is_dir() and any(out.iterdir()):
        raise ExistingFileError(f"{str(out)!r} is a folder that is not empty. Delete it or choose another output")
    if out.exists() and not out.is_dir():
        raise ExistingFileError(f"{str(out)!r} is a file, expected a new folder. Delete it or choose another output")


def partial_path(out: Path) -> Path:
    """A hidden name beside ``out``, new at each call."""
    return out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Fill a hidden folder, which becomes ``out`` at the end; after an error or Ctrl-C nothing is left.

    Args:
        out: The folder to make; it may exist if it is empty.

    Yields:
        The hidden folder beside it, empty.

    Raises:
        FileExistsError: ``out`` is a file or a folder that is not empty.
        OSError: the disk is full, or cannot be written.
    """
    check_output(out)
    folder = partial_path(out)
    try:
        with clear_disk_errors(out):
            folder.mkdir(parents=True)
            yield folder
            finish(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish(folder: Path, out: Path) -> None:
    """Flush a folder and its files to the disk and give it its name. FileExistsError if that is taken meanwhile."""
    for path in [*folder.iterdir(), folder]:
        flush_to_disk(path)
    check_output(out)
    folder.rename(out)
    flush_to_disk(out.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def clear_disk_errors(out: Path) -> Iterator[None]:
    """Let a full disk be named with the output and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(out, str(error.strerror)) from error
        raise


def disk_full(out: Path, detail: str) -> OSError:
    """The error for a disk that cannot hold ``out``."""
    return OSError(errno.ENOSPC, f"no space to write {str(out)!r}: {detail}. Free some space or choose another disk")


def write_text(path: Path, text: str) -> None:
    """Write a file, replacing one that is there in a single step.

    Args:
        path: File; its folder is made if need be.
        text: Its content, written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``path`` in the end.

    Args:
        path: Where the folder belongs; one that is there is replaced.

    Yields:
        An empty folder beside it, removed if filling it fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    outdated = path.with_name(f".{path.name}.outdated")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        # A folder cannot be replaced in one step; between these two there is none, but never half of one.
        if path.exists():
            path.rename(outdated)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)
