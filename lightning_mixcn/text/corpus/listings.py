"""The files of a source: links are followed, a real file is listed once, what is left out is counted."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from lightning_mixcn.errors import MissingFileError, UserError

from .reading import (
    LOCAL,
    check_members,
    file_name,
    identify,
    is_url,
    list_zip,
    match_urls,
    open_file,
    read_chunks,
    zip_member,
)
from .sources import DEFAULT_KEY, AnySource, RecordFileFormat, Source, SourceFile, TextFormat

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ARCHIVE = ".zip"
# Files that `datasets` writes beside the data; read as data only where it is an array of records.
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
            reason: Reason that completes "1 …", such as "hidden".
            name: Path of the file; the first one of a reason is named.
        """
        count, first = self._reasons.get(reason, (0, str(name)))
        self._reasons[reason] = (count + 1, first)

    def tell(self, logger: logging.Logger, name: str, num_files: int, more: str = "", *, warn: bool = False) -> None:
        """Log one line that says what was read of a source, and what was not.

        Args:
            logger: Logger of the line, which is a warning if anything is left out.
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


def list_files(source: AnySource, place: str = "sources[0]", left_out: LeftOut | None = None) -> list[SourceFile]:
    """List the files of a source: each pattern's matches sorted by path, each real file once.

    Args:
        source: Source of the files.
        place: Name of the source in the configuration, for errors.
        left_out: Count of what was found and is not read, by reason.

    Returns:
        At least one file.

    Raises:
        FileNotFoundError: A path matches no file.
        ValueError: An URL or archive cannot be listed, a folder holds several splits, or a file's format is neither
            given nor known by its suffix.
    """
    left_out = LeftOut() if left_out is None else left_out
    found, seen = list[Path | str](), set[object]()
    for pattern in [source.path] if isinstance(source.path, str) else source.path:
        matches = _match(pattern, source, place, left_out)
        if not matches:
            told = f" to be read, {left_out}" if len(left_out) else ""
            instead = "Give a file, a folder or a glob, e.g. data/zh/*.jsonl.gz"
            raise MissingFileError(f"`{place}.path={pattern!r}` matches no file{told}. {instead}")
        found += _once(matches, seen, left_out)
    found = _without_packed(found, left_out)
    columns, roles = source.columns or {}, tuple(sorted((source.roles or {}).items()))
    is_text = isinstance(source, Source)
    files = [
        SourceFile(
            path,
            source.format or _format_of(path, source, place),
            columns.get(DEFAULT_KEY, source.text_key) if is_text else source.text_key,
            source.document_unit,
            None if is_text else source.records or "any",
            roles,
            () if is_text else tuple(columns.items()),
            source.max_document_bytes,
        )
        for path in found
    ]
    if source.document_unit != "file" and not any(file.format == "text" for file in files):
        raise UserError(
            f"`{place}.document_unit={source.document_unit!r}` says what a document is in a text file, but no file of "
            "this source is text. Remove it, or set `format: text`"
        )
    return files


def _match(pattern: str, source: AnySource, place: str, left_out: LeftOut) -> list[Path | str]:
    """List the files of one pattern, members of archives among them."""
    local = pattern.removeprefix(LOCAL)
    if (inside := zip_member(pattern)) is not None:
        members = list_zip(inside[0], place)
        named = [name for name in sorted(members) if fits(name.split("/"), inside[1].split("/"))]
        check_members(inside[0], named, place)
        return [members[name] for name in named]
    if not is_url(local):
        matches = _match_local(local, pattern, source, place, left_out)
        found: list[Path | str] = [*matches] if local == pattern else [f"{LOCAL}{path}" for path in matches]
    else:
        choose = partial(_choose, source=source, place=place, left_out=left_out)
        found = [*match_urls(pattern, place, choose, partial(left_out.add, GLOBBED_FOLDER))]
        if glob.has_magic(pattern):
            found = _without_cache(found, pattern, place, left_out)
    return [member for path in found for member in _unpacked(path, source, place, left_out)]


def _match_local(path: str, pattern: str, source: AnySource, place: str, left_out: LeftOut) -> Sequence[Path | str]:
    expanded = Path(os.path.expanduser(path))
    if expanded.is_file():
        return [expanded]
    if not expanded.is_dir():
        return _without_cache(match_glob(str(expanded), left_out), pattern, place, left_out)
    inside = {str(file.relative_to(expanded)): file for file in walk_files(expanded, left_out)}
    files = []
    for file in sorted(inside[name] for name in _choose(list(inside), str(expanded), source, place, left_out)):
        if file.is_file():
            files.append(file)
        else:
            left_out.add("that links to nothing", file)
    if not files:
        raise MissingFileError(
            f"`{place}.path={pattern!r}` is a folder without any {' '.join(source.suffixes)} file "
            f"(nor one with {' '.join(COMPRESSIONS)} after it), {left_out}. Give a glob and `format` for other suffixes"
        )
    return files


def _without_cache(matches: Sequence[Path | str], pattern: str, place: str, left_out: LeftOut) -> list[Path | str]:
    """Leave out of what a glob matches all that `datasets` keeps beside its data."""
    datasets = DatasetFolders(_read_if_there, place, pattern)
    kept = []
    for match in matches:
        if reason := datasets.reason_against(str(match)):
            left_out.add(reason, match)
        else:
            kept.append(match)
    return kept


def _choose(
    names: list[str],
    folder: str,
    source: AnySource,
    place: str,
    left_out: LeftOut,
    locate: Callable[[str], str] | None = None,
) -> list[str]:
    """Choose the files of a folder that are the source's: known suffix, the source's format, nothing hidden.

    Args:
        names: Paths of all files inside of the folder.
        folder: Path of the folder itself.
        source: Source of the folder.
        place: Name of the source in the configuration, for errors.
        left_out: Count of the files that are not chosen.
        locate: Gives the path under which a file is opened; None puts the folder before its name.
    """
    within, there = f"{folder}/", set(names)

    def path_of(name: str) -> str:
        return locate(name) if locate else within + name

    datasets = DatasetFolders(lambda name: _read_if_there(path_of(name)) if name in there else None, place, folder)
    datasets.check_whole(names, folder)
    chosen = []
    for name in names:
        format_ = source.suffixes.get(_data_suffix(name))
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            left_out.add("hidden", within + name)
        elif format_ is None and Path(name).suffix.lower() != ARCHIVE:
            left_out.add("with another suffix", within + name)
        elif format_ is not None and source.format not in (None, format_):
            left_out.add(f"that is not {source.format}", within + name)
        elif reason := datasets.reason_against(name):
            left_out.add(reason, within + name)
        else:
            chosen.append(name)
    objects = {name for name in chosen if _data_suffix(name) == ".json" and _is_json_object(path_of(name))}
    if len(objects) == len(chosen):
        return chosen  # reading says what is wrong with them
    for name in sorted(objects):
        left_out.add("JSON that is no array", within + name)
    return [name for name in chosen if name not in objects]


def _unpacked(path: Path | str, source: AnySource, place: str, left_out: LeftOut) -> list[Path | str]:
    """List the file itself, or the members of an archive that are the source's, sorted."""
    if file_name(path).suffix.lower() != ARCHIVE:
        return [path]
    members = list_zip(path, place)

    def locate(name: str) -> str:
        check_members(path, [name], place)
        return members[name]

    chosen = _choose(sorted(members), str(path), source, place, left_out, locate)
    for name in chosen:
        if Path(name).suffix.lower() == ARCHIVE:
            raise UserError(f"`{place}.path`: `{name}` in `{path}` is an archive in an archive. Unpack the outer one")
    check_members(path, chosen, place)
    return [members[name] for name in chosen]


def _read_if_there(path: str) -> bytes | None:
    try:
        with open_file(path if is_url(path) else Path(path)) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError):
        return None


def _is_json_object(path: str) -> bool:
    """Tell whether a file is one JSON object, such as a model's configuration, and not one record a line."""
    if is_url(path.removeprefix(LOCAL)) and zip_member(path) is None:
        return False  # a request for each file of a large folder
    try:
        start = next(read_chunks(path if is_url(path) else Path(path)), b"").lstrip()
    except (OSError, ValueError):
        return False  # reading says what is wrong with it
    if not start.startswith(b"{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text := start.decode(errors="replace"))
    except (ValueError, RecursionError):
        return True
    return not text[end:].strip()


def _format_of(file: Path | str, source: AnySource, place: str) -> TextFormat | RecordFileFormat:
    known = source.suffixes.get(_data_suffix(file))
    if known is None:
        raise UserError(
            f"The format of `{file}` cannot be told from its suffix. Set `{place}.format` to one of "
            f"{', '.join(dict.fromkeys(source.suffixes.values()))}"
        )
    return known


def _data_suffix(file: Path | str) -> str:
    suffixes = [suffix.lower() for suffix in file_name(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def walk_files(folder: Path, left_out: LeftOut, *, hidden: bool = False) -> Iterator[Path]:
    """Walk a folder and its sub-folders, linked ones too, as `**` of a glob does, but no circle of links.

    Args:
        folder: Folder to walk.
        left_out: Count of what is hidden, or has a name that is not UTF-8.
        hidden: True to list names that begin with a dot, too.

    Yields:
        All that is no folder, also links that lead nowhere.

    Raises:
        UserError: A folder cannot be opened: what is in it would be missing without a word.
    """
    return _walk(folder, frozenset(), left_out, hidden)


def _walk(folder: Path, above: frozenset[tuple[int, int]], left_out: LeftOut, hidden: bool) -> Iterator[Path]:
    status = folder.stat()
    names = _names_in(folder)
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


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:  # removed since it was listed
        return []
    except OSError as error:
        if folder.name == "lost+found":  # at the top of every ext4 disk; root's, and nobody's data
            return []
        raise UserError(
            f"The folder `{folder}` cannot be opened: {error.strerror}. Make it readable, or give a glob or a list of "
            "paths that leaves it out"
        ) from error


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
        left_out: Count of matches that are no files; those of `**` are looked into.

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
        yield from _expand(Path(), parts)
        return
    # glob.glob goes round circles of links until a path is too long: minutes, or for ever with two of them.
    first = parts.index("**")
    wanted = parts[first:]
    hidden = any(part.startswith(".") for part in wanted)
    for root in _expand(Path(), parts[:first]):
        if root.is_dir():
            for path in walk_files(root, left_out, hidden=hidden):
                if fits(path.relative_to(root).parts, wanted):
                    yield path


def _expand(folder: Path, wanted: Sequence[str]) -> Iterator[Path]:
    """List what the parts of a glob without `**` match in a folder; glob.glob passes over folders it cannot open."""
    if not wanted:
        yield folder
    elif not glob.has_magic(wanted[0]):
        if os.path.lexists(folder / wanted[0]):
            yield from _expand(folder / wanted[0], wanted[1:])
    elif os.path.isdir(folder):
        for name in _names_in(folder):
            if fits([name], wanted[:1]):
                yield from _expand(folder / name, wanted[1:])


def fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Tell whether the names of a path are those of a glob, in which `**` is any number of names."""
    if not wanted:
        return not names
    if wanted[0] == "**":
        return fits(names, wanted[1:]) or (bool(names) and not names[0].startswith(".") and fits(names[1:], wanted))
    if not names or (names[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    return fnmatchcase(names[0], wanted[0]) and fits(names[1:], wanted[1:])


def _once(paths: list[Path | str], seen: set[object], left_out: LeftOut) -> list[Path | str]:
    """Leave out files that were listed before, by this path or by another one that leads to it.

    Args:
        paths: Files or URLs in their order.
        seen: Identities of the files listed before; those of `paths` are added.
        left_out: Count of what is left out.

    Returns:
        The new ones, in their order; of several paths of one file, one that is no link, else the shortest.
    """
    paths = list(dict.fromkeys(paths))
    groups = dict[object, list[Path | str]]()
    for path in paths:
        groups.setdefault(_identity(path), []).append(path)
    chosen = {
        min(group, key=_preference) if len(group) > 1 else group[0]
        for identity, group in groups.items()
        if identity not in seen
    }
    seen.update(groups)
    for path in paths:
        if path not in chosen:
            left_out.add("already listed by another path or pattern", path)
    return [path for path in paths if path in chosen]


def _without_packed(files: Sequence[Path | str], left_out: LeftOut) -> list[Path | str]:
    """Leave out members of zip archives that are unpacked beside it or in a folder of its name, with the same size."""
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
        place: Name of the source in the configuration, for errors.
        path: Path in the source, for errors.
    """

    def __init__(self, read: Callable[[str], bytes | None], place: str, path: str) -> None:
        """Read nothing yet."""
        self._read, self._place = read, f"{place}.path={path!r}"
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
            root: Path of the folder, for errors.

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
        """List the data files in a folder of one dataset, None for another folder."""
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
