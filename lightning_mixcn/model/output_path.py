"""Output that appears under its name only when it is whole, and a full disk that says so."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(out: Path) -> None:
    """Raise FileExistsError unless ``out`` is free to be made (absent, or an empty folder)."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{str(out)!r} is a folder that is not empty. Delete it or choose another output")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file, expected a new folder. Delete it or choose another output")


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
