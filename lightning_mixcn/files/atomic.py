"""Write output that appears under its name only when it is whole, and remove what is ours, nothing else.

All output of this package goes to a hidden name beside its own, is flushed to the disk and renamed. One process at a
time writes an output (`owned`), so what is hidden when it begins was left by a killed one, and is removed.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import ExistingFileError, InUseError

from .lock import WAIT, lock_path, locked


@contextmanager
def owned(out: Path, shown: str = "", advice: str = WAIT) -> Iterator[None]:
    """Be the only process that writes an output; what a killed one left of it is removed first.

    Args:
        out: File or folder.
        shown: What an error calls it; its path where this is empty.
        advice: What an error says to do where another process writes it.

    Raises:
        ValueError: another process writes it.
        OSError: its folder cannot be written.
    """
    with ExitStack() as stack:
        with naming_output(out, shown):
            stack.enter_context(locked(out, shown, advice))
            outdated = _outdated_path(out)
            if outdated.exists() and not os.path.lexists(out):
                outdated.rename(out)  # killed in the middle of a replacement: the old one is all there is
            for left in (partial_path(out), outdated, _removed_path(out), _removed_path(unfinished_path(out))):
                _delete(left)
        yield


@contextmanager
def new_folder(out: Path, *, replace: Collection[str] = ()) -> Iterator[Path]:
    """Fill a hidden folder, which becomes ``out`` at the end; after an error or Ctrl-C nothing is left.

    Args:
        out: Folder to make; it may exist if it is empty.
        replace: Take the place of a folder of ours: the name of the file that it is known by, followed by patterns of
            what else we write there. Other files in it are kept; a folder without that file is not replaced.

    Yields:
        The hidden folder, empty.

    Raises:
        FileExistsError: ``out`` is a file or a folder that is not empty, and is not to be replaced.
        ValueError: another process writes it.
        OSError: the disk is full, or cannot be written.
    """
    check_replaceable(out, replace)
    folder = partial_path(out)
    with naming_output(out), owned(out):
        try:
            folder.mkdir()
            yield folder
            _flush_all(folder)
            move_into_place(folder, out, replace)
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
        ValueError: another process writes it.
        OSError: the disk is full, or cannot be written.
    """
    if not replace or out.is_dir():
        check_file(out)
    unfinished = partial_path(out)
    with naming_output(out), owned(out):
        try:
            yield unfinished
            if not replace:
                check_file(out)
            move_into_place(unfinished, out)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def removed_after_error(unfinished: Path) -> Iterator[None]:
    """Remove a hidden file or folder if its writing ends early: the disk may be full, and the space is needed."""
    try:
        yield
    except BaseException:
        _delete(unfinished)
        raise


@contextmanager
def scratch_folder(name: Path) -> Iterator[Path]:
    """Have a hidden folder that is removed in the end, and after a kill by the next one of this name.

    Yields:
        The folder, empty.
    """
    folder = partial_path(name)
    with owned(name):
        try:
            folder.mkdir()
            yield folder
        finally:
            _delete(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8, replacing one that is there in one step; its folder is made if need be."""
    with new_file(path, replace=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, indent: int = 2, sort_keys: bool = False) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent, sort_keys=sort_keys) + "\n")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a text file, after its last whole one: a kill, or a full disk, leaves half of a line.

    Args:
        path: The file; it and its folder are made if need be.
        lines: Each with its line feed.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    with naming_output(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(lines).encode())


def keep_lines(path: Path, is_kept: Callable[[str], bool], header: str = "") -> None:
    """Remove lines from a text file in one step, half of a line at its end too; other lines stay as they are.

    Args:
        path: The file; without one there are no lines.
        is_kept: Function of a line, which tells whether it stays.
        header: First line, which is not asked for, and is made if need be.
    """
    # Half of a character, at the end of half of a line, is no UTF-8.
    before = path.read_bytes().decode(errors="replace") if path.exists() else ""
    lines = [f"{line}\n" for line in before.split("\n")[:-1]][1 if header else 0 :]
    write_text(path, header + "".join(line for line in lines if is_kept(line)))


def check_output(out: Path) -> None:
    """Raise FileExistsError unless a folder can be made (absent, or an empty folder)."""
    if out.is_dir() and any(out.iterdir()):
        raise ExistingFileError(f"{str(out)!r} is a folder that is not empty. Delete it or choose another output")
    if out.exists() and not out.is_dir():
        raise ExistingFileError(f"{str(out)!r} is a file, expected a new folder. Delete it or choose another output")
    if os.path.ismount(out):
        raise ExistingFileError(
            f"{str(out)!r} is the top of a file system, with no room beside it. Give a folder in it"
        )


def check_replaceable(out: Path, replace: Collection[str]) -> None:
    """Raise FileExistsError if there is something that `new_folder` does not replace."""
    if not replace or not out.is_dir():
        check_output(out)
    elif any(out.iterdir()) and not (out / (mark := next(iter(replace)))).exists():
        raise ExistingFileError(
            f"{str(out)!r} is a folder with something else in it: it has no {mark}. Move it away or choose another name"
        )


def check_file(out: Path) -> None:
    """Raise FileExistsError unless a file of this name can be made."""
    if out.is_dir():
        raise ExistingFileError(f"{str(out)!r} is a folder, expected a new file. Give the name of a file in it")
    if out.exists():
        raise ExistingFileError(f"{str(out)!r} is a file, expected a new one. Delete it or choose another output")


def unfinished_path(path: Path) -> Path:
    """Return the hidden name for output that several processes write together; see `move_into_place`."""
    return path.with_name(f".{path.name}.unfinished")


def move_into_place(unfinished: Path, path: Path, replace: Collection[str] = ()) -> None:
    """Give a complete file or folder its name.

    A file that has the name is replaced in one step, a folder in two, between which there is none.

    Args:
        unfinished: Hidden file or folder; the files in a folder are flushed to the disk already.
        path: Its name beside it.
        replace: What a folder that has the name must hold to be replaced, as in `new_folder`.

    Raises:
        FileExistsError: a folder has the name, and is not to be replaced.
    """
    flush_to_disk(unfinished)
    outdated = _outdated_path(path)
    if unfinished.is_dir():
        check_replaceable(path, replace)
        if path.is_dir() and any(path.iterdir()):
            for foreign in _foreign(path, replace):
                _copy(foreign, unfinished / foreign.name)
                _flush_all(unfinished / foreign.name)
            _delete(outdated)  # of a killed process
            path.rename(outdated)
    elif path.is_dir():
        check_file(path)
    unfinished.replace(path)
    flush_to_disk(path.parent)
    _delete(outdated)


def replace_link(link: Path, target: Path) -> None:
    """Have a symbolic link point to a file or folder, changing one that is there in one step."""
    unfinished = unfinished_path(link)
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(os.path.relpath(target, link.parent))
    unfinished.replace(link)


def remove_path(path: Path, mark: str = "") -> None:
    """Remove a file or a folder of ours; a kill never leaves half a folder under its name.

    Args:
        path: What to remove; it need not be there.
        mark: Name of a file by which the folder is known as ours.

    Raises:
        FileExistsError: it is a folder without that file, which stays.
    """
    removed = _removed_path(path)
    _delete(removed)  # of a killed process
    if path.is_dir() and not path.is_symlink():
        check_replaceable(path, [mark])
        path.rename(removed)
        path = removed
    _delete(path)


def remove_leftovers(folder: Path, names: str = ".+") -> None:
    """Remove what killed processes left of some outputs in a folder; what a living one writes stays.

    Args:
        folder: The folder.
        names: Regular expression of the outputs' names. What several processes wrote together, which has no owner, is
            removed too.
    """
    hidden = re.compile(rf"\.({names})\.(?:lock|outdated|removed|unfinished)|\.(.+)\.partial(\.[^.]+)?")
    for left in folder.glob(".*"):
        if (found := hidden.fullmatch(left.name)) is None:
            continue
        name = found[1] or f"{found[2]}{found[3] or ''}"
        if re.fullmatch(names, name):
            with suppress(InUseError), locked(folder / name):
                for hide in _HIDDEN:
                    _delete(hide(folder / name))


def partial_path(out: Path) -> Path:
    """Return the hidden name under which its owner writes an output."""
    return out.with_name(f".{out.stem}.partial{out.suffix}")


def _outdated_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.outdated")


def _removed_path(path: Path) -> Path:
    """Return the hidden name of a folder that may be half removed already; an outdated one is whole."""
    return path.with_name(f".{path.name}.removed")


_HIDDEN = (partial_path, unfinished_path, _outdated_path, _removed_path)


def _foreign(folder: Path, ours: Collection[str]) -> list[Path]:
    """List what a folder holds that this package did not write: a user's notes, for instance."""
    return [path for path in folder.iterdir() if not any(fnmatch(path.name, pattern) for pattern in ours)]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(path: Path) -> None:
    for part in (path, *path.rglob("*")):
        if not part.is_symlink():  # it may lead nowhere
            flush_to_disk(part)


@contextmanager
def naming_output(out: Path, shown: str = "") -> Iterator[None]:
    """Add the output's name, and what to do, to the error of a disk that is full or cannot be written.

    Args:
        out: File or folder.
        shown: What the error calls it; its path where this is empty.
    """
    shown = shown or repr(str(out))
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # That of a file in it.
            detail = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.strerror
            message = f"no space to write {shown}: {detail}. Free some space or choose another disk"
            raise OSError(errno.ENOSPC, message) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and _is_part(error.filename, out):
            message = f"{shown} cannot be written: {error.strerror}. Choose another output, or get the right to"
            raise PermissionError(error.errno, message) from error
        raise


def _is_part(name: object, out: Path) -> bool:
    """Tell whether the file of an error is an output, something in or above it, or hidden beside it."""
    if not isinstance(name, str | bytes):
        return False
    place, out = Path(os.fsdecode(name)).absolute(), out.absolute()
    parts = [out, lock_path(out), *(hide(out) for hide in _HIDDEN)]
    return out.is_relative_to(place) or any(place.is_relative_to(part) for part in parts)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
