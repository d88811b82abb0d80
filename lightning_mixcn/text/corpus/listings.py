"""Which files a folder or a glob names: links are followed, a real file is listed once, what is left out is counted."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lightning_mixcn.errors import MissingFileError, UserError

from .reading import (
    LOCAL,
    identify,
    is_url,
    zip_member,
)

# What `datasets` writes beside the data; read as data only where it is an array of records.
_DATASETS_METADATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
GLOBBED_FOLDER = "matched as a folder, in which a glob does not look; write **"
_DATASETS_CACHE = re.compile(r"cache-[0-9a-f]{8,}(_\d+_of_\d+)?\.arrow")


class LeftOut:
    """Count of the files that a listing leaves out, by reason."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._reasons = dict[str, tuple[int, str]]()

    def add(self, reason: str, name: object) -> None:
        """Count something that is left out.

        Args:
            reason: Completes "1 …", such as "hidden".
            name: Path of it; the first of a reason is named.
        """
        count, first = self._reasons.get(reason, (0, str(name)))
        self._reasons[reason] = (count + 1, first)

    def tell(self, logger: logging.Logger, name: str, num_files: int, more: str = "", *, warn: bool = False) -> None:
        """Log one line that says what was read of a source, and what was not.

        Args:
            logger: Where to; as a warning if anything is left out.
            name: Name of the source.
            num_files: Files that are read.
            more: Further text of the line.
            warn: True if `more` is about a loss, too.
        """
        level = logging.WARNING if len(self) or warn else logging.INFO
        logger.log(level, "Source %r: %d files read, %s%s", name, num_files, self, more)

    def __len__(self) -> int:
        """Count all that is left out."""
        return sum(count for count, _ in self._reasons.values())

    def __str__(self) -> str:
        """Say how many are left out and why, on one line."""
        parts = []
        for reason, (count, first) in self._reasons.items():
            shown = first.encode(errors="backslashreplace").decode()
            parts.append(f"{count} {reason} (`{shown}`{', …' if count > 1 else ''})")
        return f"{len(self)} left out" + (f": {', '.join(parts)}" if parts else "")


def walk_files(folder: Path, left_out: LeftOut, *, hidden: bool = False) -> Iterator[Path]:
    """Walk a folder and its sub-folders, linked ones too, as `**` of a glob does, but no circle of links.

    Args:
        folder: The folder.
        left_out: Counts what is hidden, cannot be opened, or has a name that is not UTF-8.
        hidden: True to list names that begin with a dot, too.

    Yields:
        All that is no folder, also links that lead nowhere.
    """
    return _walk(folder, frozenset(), left_out, hidden)


def _walk(folder: Path, above: frozenset[tuple[int, int]], left_out: LeftOut, hidden: bool) -> Iterator[Path]:
    try:
        status = folder.stat()
        names = sorted(os.listdir(folder))
    except OSError as error:
        left_out.add(f"that cannot be opened ({error.strerror})", folder)
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        left_out.add("linked folder that holds itself", folder)
        return
    for name in names:
        path = folder / name
        if name.startswith(".") and not hidden:
            left_out.add("hidden", path)
        elif not _is_unicode(name):
            left_out.add("with a name that is not UTF-8", path)
        elif os.path.isdir(path):
            yield from _walk(path, above | {identity}, left_out, hidden)
        else:
            yield path


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the file system's bytes, kept as surrogates
        return False
    return True


def match_glob(pattern: str, left_out: LeftOut) -> list[Path]:
    """List the files that a glob matches.

    Args:
        pattern: Glob with `*`, `?`, `[…]` and `**`.
        left_out: Counts matches that are no files; those of `**` are looked into.

    Returns:
        Files, sorted by path; none if there are none.
    """
    found = []
    for path in _matches(pattern, left_out):
        if not _is_unicode(str(path)):
            left_out.add("with a name that is not UTF-8", path)
        elif path.is_file():
            found.append(path)
        elif path.is_dir():
            left_out.add(GLOBBED_FOLDER, path)
        elif path.is_symlink():
            left_out.add("that links to nothing", path)
    return sorted(found)


def _matches(pattern: str, left_out: LeftOut) -> Iterator[Path]:
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    # glob.glob goes round circles of links until a path is too long: minutes, or for ever with two of them.
    first = parts.index("**")
    wanted = parts[first:]
    hidden = any(part.startswith(".") for part in wanted)
    roots = glob.glob(str(Path(*parts[:first]))) if first else ["."]
    for root in map(Path, roots):
        if root.is_dir():
            for path in walk_files(root, left_out, hidden=hidden):
                if fits(path.relative_to(root).parts, wanted):
                    yield path


def fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Tell whether the names of a path are those of a glob, in which `**` is any number of names."""
    if not wanted:
        return not names
    if wanted[0] == "**":
        return fits(names, wanted[1:]) or (bool(names) and not names[0].startswith(".") and fits(names[1:], wanted))
    if not names or (names[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    return fnmatchcase(names[0], wanted[0]) and fits(names[1:], wanted[1:])


class ReadOnce:
    """Tells whether a file was listed before, by this path or by another one that leads to it."""

    def __init__(self, left_out: LeftOut) -> None:
        """Start with no file."""
        self._seen, self._left_out = set[object](), left_out

    def keep(self, paths: Iterable[Path | str]) -> list[Path | str]:
        """Leave out what was listed before.

        Args:
            paths: Files or URLs in their order.

        Returns:
            Those that are new, in their order; of several paths of one file, one that is no link, else the shortest.
        """
        paths = list(dict.fromkeys(paths))
        groups = dict[object, list[Path | str]]()
        for path in paths:
            groups.setdefault(_identity(path), []).append(path)
        kept = {identity: min(group, key=_preference) if len(group) > 1 else group[0]
                for identity, group in groups.items() if identity not in self._seen}  # fmt: skip
        self._seen |= set(groups)
        chosen = set(kept.values())
        for path in paths:
            if path not in chosen:
                self._left_out.add("already listed by another path or pattern", path)
        return [path for path in paths if path in chosen]


def leave_out_packed(files: Sequence[Path | str], left_out: LeftOut) -> list[Path | str]:
    """Leave out members of zip archives that are listed unpacked, too: beside the archive or in a folder of its name.

    Args:
        files: Files, URLs and members of archives.
        left_out: Counts members of which a file has the name and the size.

    Returns:
        The others, in their order.
    """
    unpacked = {_absolute(file): file for file in files if not isinstance(file, str) or zip_member(file) is None}
    kept = []
    for file in files:
        inside = zip_member(file) if isinstance(file, str) else None
        beside = None
        if inside is not None:
            folder, _, name = _absolute(inside[0]).rpartition("/")
            places = (f"{folder}/{inside[1]}", f"{folder}/{Path(name).stem}/{inside[1]}")
            beside = next((unpacked[place] for place in places if place in unpacked), None)
        if beside is not None and identify(file)["size"] == identify(beside)["size"]:
            left_out.add("in an archive and beside it", file)
        else:
            kept.append(file)
    return kept


def _absolute(path: Path | str) -> str:
    local = str(path).removeprefix(LOCAL)
    return local if is_url(local) else os.path.abspath(local)


def _identity(path: Path | str) -> object:
    if isinstance(path, str):
        if (inside := zip_member(path)) is not None:
            return (_identity(inside[0]), inside[1])
        if is_url(path.removeprefix(LOCAL)):
            return path
    status = os.stat(str(path).removeprefix(LOCAL))
    # Some network file systems give two files one inode number: they still differ in size or time.
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _preference(path: Path | str) -> tuple[bool, int, str]:
    local = str(path).removeprefix(LOCAL)
    return (os.path.realpath(local) != os.path.abspath(local), len(Path(local).parts), local)


class DatasetFolders:
    """Tells the data in folders of `datasets.save_to_disk` from what `datasets` keeps beside it.

    Args:
        read: Reads a file by its path, None if there is none.
        place: How the configuration names the path, for errors.
    """

    def __init__(self, read: Callable[[str], bytes | None], place: str) -> None:
        """Read nothing yet."""
        self._read, self._place = read, place
        self._objects = dict[str, dict[str, object] | None]()

    def reason_against(self, path: str) -> str | None:
        """Say why a file is not to be read, None if it is.

        Raises:
            ValueError: The dataset's rows are chosen by a list of indices beside the data.
        """
        folder, slash, name = path.rpartition("/")
        if name in _DATASETS_METADATA:
            return None if self._object(path) is None else "of datasets' metadata"
        if not name.endswith(".arrow"):
            return None
        listed = self._listed(folder + slash)
        if listed is not None and name not in listed:
            return "not listed in the folder's state.json"
        if listed is None and _DATASETS_CACHE.fullmatch(name) and self._object(f"{folder}{slash}dataset_info.json"):
            return "of datasets' cache"
        return None

    def check_whole(self, paths: Iterable[str], root: str) -> None:
        """Check a folder of which all paths are given: nothing listed is missing, and there is one split.

        Args:
            paths: Paths of all files, from the folder on.
            root: The folder, for errors.

        Raises:
            FileNotFoundError: A file that a state.json lists is missing.
            ValueError: There are several splits.
        """
        there = set(paths)
        for path in sorted(there):
            folder, slash, name = path.rpartition("/")
            if name == "state.json":
                missing = sorted(
                    file for file in self._listed(folder + slash) or () if folder + slash + file not in there
                )
                if missing:
                    raise MissingFileError(
                        f"`{root}/{path}` lists `{missing[0]}`, which is not there. Get the dataset again"
                    )
            splits = (self._object(path) or {}).get("splits") if name == "dataset_dict.json" else None
            if isinstance(splits, list) and len(splits) > 1:
                named, splits = f"{root}/{folder}".rstrip("/"), list(map(str, splits))
                raise UserError(
                    f"`{self._place}`: `{named}` is a DatasetDict with the splits {', '.join(splits)}. "
                    f"Name the split to read, e.g. {named}/{splits[0]}, or list several"
                )

    def _listed(self, folder: str) -> set[str] | None:
        """Names of the data files in a folder of one dataset, None for another folder."""
        state = self._object(f"{folder}state.json") or {}
        files = state.get("_data_files")
        if not isinstance(files, list):
            return None
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise UserError(
                f"`{self._place}`: the rows of `{folder or '.'}` are chosen by a list of indices. "
                "Save the dataset again with a newer `datasets`, or after `flatten_indices()`"
            )
        return {str(file["filename"]) for file in files if isinstance(file, dict) and "filename" in file}

    def _object(self, path: str) -> dict[str, object] | None:
        """Get the JSON object in a file, None if there is no such file or something else in it."""
        if path not in self._objects:
            try:
                content = json.loads(self._read(path) or b"null")
            except ValueError:
                content = None
            self._objects[path] = content if isinstance(content, dict) else None
        return self._objects[path]
