"""Where text and conversations come from: named, weighted sources of files, listed in a fixed order."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.text.chat.records import OBEYED_KEYS, RecordFormat
from lightning_mixcn.text.chat.turns import ROLES

from .listings import (
    GLOBBED_FOLDER,
    DatasetFolders,
    LeftOut,
    ReadOnce,
    fits,
    leave_out_packed,
    match_glob,
    walk_files,
)
from .reading import (
    LOCAL,
    check_members,
    file_name,
    is_url,
    list_zip,
    match_urls,
    open_file,
    read_chunks,
    zip_member,
)

TextFormat = Literal["jsonl", "text", "parquet", "arrow", "json"]
RecordFileFormat = Literal["json", "jsonl", "parquet", "arrow"]
DocumentUnit = Literal["file", "line", "blank-line"]

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ARCHIVE = ".zip"
_DEFAULT_KEY = "text"
_RECORDS: dict[str, Any] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}


# The annotations of this class are resolved by jsonargparse for the YAML, hence plain builtins.
@dataclass(frozen=True)
class Source:
    """A named set of text files.

    Args:
        name: Short name, unique in its list; it appears in TensorBoard tags such as `val/<name>/bits_per_byte`.
        path: A file, a folder (searched recursively for known suffixes, through links too), a zip archive, a glob with
            `*` and `**`, one of these as an URL that fsspec has a driver for, such as `s3://bucket/zh/*.jsonl.gz`, or a
            list of these. A file is read once, however many of them lead to it.
        weight: Share of the training text relative to the other sources' weights, in tokens or, by the data module's
            `weight_unit`, in bytes.
        format: Format of the files; null tells it from each file's suffix, before `.gz`, `.zst`, `.bz2` or `.xz`.
            `json` is one array of records or of texts, which is held in memory while it is unpacked.
        text_key: JSON key, or parquet or Arrow column, that holds a document's text.
        document_unit: Unit of a text file that is one document: the whole file, a line, or a block between blank lines.
        max_epochs: How often the training set of this source is read before it stops; null repeats it for ever.
        columns: The records' name of `text`, such as `{text: content}`: the same as `text_key`, so give one of them.
    """

    name: str
    path: str | list[str]
    weight: float = 1.0
    format: TextFormat | None = None
    text_key: str = _DEFAULT_KEY
    document_unit: DocumentUnit = "file"
    max_epochs: int | None = None
    columns: dict[str, str] | None = None

    suffixes: ClassVar[dict[str, TextFormat]] = {**_RECORDS, ".txt": "text", ".text": "text"}
    records: ClassVar[None] = None
    roles: ClassVar[None] = None


@dataclass(frozen=True)
class ConversationSource:
    """A named set of files of conversations.

    Args:
        name: Short name, unique in its list; it appears in TensorBoard tags such as `val/<name>/bits_per_byte`.
        path: A file, a folder (searched recursively for known suffixes, through links too), a zip archive, a glob with
            `*` and `**`, one of these as an URL that fsspec has a driver for, or a list of these. A file is read once,
            however many of them lead to it.
        weight: Share of the training tokens relative to the other sources' weights.
        format: Format of the files; null tells it from each file's suffix. `json` is one array of records, which is
            held in memory while it is unpacked.
        records: Form of the records; null tells it from each record's keys. `alpaca` has `instruction`, `input`,
            `output` and perhaps `system` and `history`; `sharegpt` has `conversations`; `messages` has `messages`.
        roles: Meanings of the records' roles, as `user`, `assistant` or `system`, beside those known (human, user, gpt,
            chatgpt, assistant, system), such as `{tool: user, developer: system}`; a role without a meaning is a bad
            record.
        max_epochs: How often the training set of this source is read before it stops; null repeats it for ever.
        columns: The records' names of keys that `records` expects, such as `{instruction: input, output: target}`
            for records that have a question in `input` and its answer in `target`.
    """

    name: str
    path: str | list[str]
    weight: float = 1.0
    format: RecordFileFormat | None = None
    records: RecordFormat | None = None
    roles: dict[str, str] | None = None
    max_epochs: int | None = None
    columns: dict[str, str] | None = None

    suffixes: ClassVar[dict[str, RecordFileFormat]] = _RECORDS
    text_key: ClassVar[str] = ""
    document_unit: ClassVar[DocumentUnit] = "file"


AnySource = Source | ConversationSource
SourceKind = TypeVar("SourceKind", Source, ConversationSource)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Args:
        path: The file; a string if it is an URL or in a zip archive.
        format: Its format, given or told from the suffix.
        text_key: JSON key, or parquet or Arrow column, of the text.
        document_unit: Unit of a text file that is one document.
        records: Form of the records if they are conversations, `any` tells it from each record; None if they are text.
        roles: Pairs of a role of the records and what it means.
        columns: For conversations, pairs of a key that their form expects and the records' name of it.
    """

    path: Path | str
    format: TextFormat | RecordFileFormat
    text_key: str
    document_unit: DocumentUnit
    records: RecordFormat | Literal["any"] | None = None
    roles: tuple[tuple[str, str], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()


def parse_sources(
    entries: Sequence[SourceKind | Mapping[str, Any]], argument: str, kind: type[SourceKind]
) -> tuple[SourceKind, ...]:
    """Check sources and turn dictionaries, as a YAML has them, into sources.

    Args:
        entries: Sources, or mappings with their fields.
        argument: Name of the argument they came from, for errors.
        kind: `Source` or `ConversationSource`.

    Returns:
        The sources in the same order.

    Raises:
        ValueError: An unknown or missing field, a duplicate name, or a value out of range.
    """
    sources = tuple(_parse(entry, f"{argument}[{index}]", kind) for index, entry in enumerate(entries))
    first: dict[str, int] = {}
    for index, source in enumerate(sources):
        if (other := first.setdefault(source.name, index)) != index:
            raise UserError(
                f"`{argument}[{index}].name={source.name!r}` is already the name of `{argument}[{other}]`. "
                "Give each source a name of its own, or one source a list of paths."
            )
    return sources


def _parse(entry: SourceKind | Mapping[str, Any], place: str, kind: type[SourceKind]) -> SourceKind:
    if isinstance(entry, Mapping):
        known = [field.name for field in fields(kind)]
        if unknown := [key for key in entry if key not in known]:
            raise UserError(f"`{place}` has the unknown key {unknown[0]!r}. Known keys: {', '.join(known)}")
        if missing := [key for key in ("name", "path") if key not in entry]:
            raise UserError(f"`{place}` has no `{missing[0]}`. Give at least name and path")
        entry = kind(**entry)
    if not isinstance(entry, kind):
        raise UserError(f"`{place}` is a {type(entry).__name__}: expected a {kind.__name__}")
    _check(entry, place)
    return entry


def _check(source: AnySource, place: str) -> None:
    formats = get_args(TextFormat if isinstance(source, Source) else RecordFileFormat)
    units, forms = get_args(DocumentUnit), get_args(RecordFormat)
    name, path, weight, epochs = source.name, source.path, source.weight, source.max_epochs
    named = isinstance(name, str) and bool(name) and "/" not in name
    paths = [path] if isinstance(path, str) else path
    located = isinstance(paths, list) and bool(paths) and all(isinstance(part, str) and part for part in paths)
    weighted = isinstance(weight, (int, float)) and 0 < weight < math.inf
    expectations = {
        "name": (named, "a name without a slash (it is part of TensorBoard tags)"),
        "path": (located, "a file, a folder, a glob, or a list of these"),
        "weight": (weighted, "a positive number; remove the source to leave it out"),
        "format": (source.format in (None, *formats), f"null or one of {', '.join(formats)}"),
        "records": (source.records in (None, *forms), f"null or one of {', '.join(forms)}"),
        "document_unit": (source.document_unit in units, f"one of {', '.join(units)}"),
        "max_epochs": (epochs is None or (isinstance(epochs, int) and epochs >= 1), "null (for ever) or at least 1"),
    }
    columns = {} if source.columns is None else source.columns
    named_keys = isinstance(columns, Mapping) and all(isinstance(key, str) and key for key in columns.values())
    renamed = sorted({_DEFAULT_KEY} if isinstance(source, Source) else OBEYED_KEYS)
    expectations["columns"] = (
        named_keys and all(key in renamed for key in columns),
        f"null, or the records' name of each of these keys that is another: {', '.join(renamed)}",
    )
    if isinstance(source, Source):
        keyed = isinstance(source.text_key, str) and bool(source.text_key)
        expectations["text_key"] = (keyed, "the key or column of the text")
        expectations["columns"] = (
            expectations["columns"][0] and (not columns or source.text_key == _DEFAULT_KEY),
            f"{expectations['columns'][1]}; and not both `columns` and `text_key={source.text_key!r}`",
        )
    else:
        expectations["roles"] = (_are_roles(source.roles), f"roles and what each means, one of {', '.join(ROLES)}")
    for field, (holds, expected) in expectations.items():
        if not holds:
            raise UserError(f"`{place}.{field}={getattr(source, field)!r}`: expected {expected}")


def _are_roles(roles: Any) -> bool:
    if roles is None:
        return True
    return isinstance(roles, Mapping) and all(isinstance(name, str) and role in ROLES for name, role in roles.items())


def list_files(source: AnySource, place: str = "sources[0]", left_out: LeftOut | None = None) -> list[SourceFile]:
    """List the files of a source: each pattern's matches sorted by path, each real file once.

    Args:
        source: The source.
        place: How the configuration names it, for errors.
        left_out: Counts what was found and is not read, by reason.

    Returns:
        At least one file.

    Raises:
        FileNotFoundError: A path matches no file.
        ValueError: An URL or archive cannot be listed, a folder holds several splits, or a file's format is neither
            given nor told by its suffix.
    """
    left_out = LeftOut() if left_out is None else left_out
    patterns = [source.path] if isinstance(source.path, str) else source.path
    once = ReadOnce(left_out)
    found = leave_out_packed(
        [path for pattern in patterns for path in once.keep(_match(pattern, source, place, left_out))], left_out
    )
    columns, roles = source.columns or {}, tuple(sorted((source.roles or {}).items()))
    is_text = isinstance(source, Source)
    files = [
        SourceFile(
            path,
            source.format or _format_of(path, source, place),
            columns.get(_DEFAULT_KEY, source.text_key) if is_text else source.text_key,
            source.document_unit,
            None if is_text else source.records or "any",
            roles,
            () if is_text else tuple(columns.items()),
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
    """Files of one pattern, members of archives among them."""
    local = pattern.removeprefix(LOCAL)
    if (inside := zip_member(pattern)) is not None:
        members = list_zip(inside[0], place)
        named = [name for name in sorted(members) if fits(name.split("/"), inside[1].split("/"))]
        check_members(inside[0], named, place)
        return _required([members[name] for name in named], pattern, place, left_out)
    if not is_url(local):
        matches = _match_local(local, pattern, source, place, left_out)
        found: list[Path | str] = [*matches] if local == pattern else [f"{LOCAL}{path}" for path in matches]
    else:
        choose = _chooser(source, place, left_out)
        found = [*match_urls(pattern, place, choose, partial(left_out.add, GLOBBED_FOLDER))]
        if glob.has_magic(pattern):
            found = _without_cache(found, pattern, place, left_out)
    files = [member for path in found for member in _unpacked(path, source, place, left_out)]
    return _required(files, pattern, place, left_out)


def _match_local(path: str, pattern: str, source: AnySource, place: str, left_out: LeftOut) -> Sequence[Path | str]:
    expanded = Path(os.path.expanduser(path))
    if expanded.is_file():
        return [expanded]
    if not expanded.is_dir():
        return _without_cache(match_glob(str(expanded), left_out), pattern, place, left_out)
    inside = {str(file.relative_to(expanded)): file for file in walk_files(expanded, left_out)}
    files = []
    for file in sorted(inside[name] for name in _chooser(source, place, left_out)(list(inside), str(expanded))):
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
    datasets = DatasetFolders(_read_if_there, f"{place}.path={pattern!r}")
    kept = []
    for match in matches:
        if reason := datasets.reason_against(str(match)):
            left_out.add(reason, match)
        else:
            kept.append(match)
    return kept


def _required(files: list[Path | str], pattern: str, place: str, left_out: LeftOut) -> list[Path | str]:
    if not files:
        told = f" to be read, {left_out}" if len(left_out) else ""
        instead = "Give a file, a folder or a glob, e.g. data/zh/*.jsonl.gz"
        raise MissingFileError(f"`{place}.path={pattern!r}` matches no file{told}. {instead}")
    return files


def _chooser(
    source: AnySource, place: str, left_out: LeftOut, locate: Callable[[str], str] | None = None
) -> Callable[[list[str], str], list[str]]:
    """Choose the files of a folder that are the source's: known suffix, the source's format, nothing hidden.

    The result takes all paths inside of the folder, and the folder's own; `locate` tells where to open one of them.
    """

    def choose(names: list[str], folder: str) -> list[str]:
        within, there = f"{folder}/", set(names)

        def path_of(name: str) -> str:
            return locate(name) if locate else within + name

        def read_inside(name: str) -> bytes | None:
            return _read_if_there(path_of(name)) if name in there else None

        datasets = DatasetFolders(read_inside, f"{place}.path={folder!r}")
        datasets.check_whole(names, folder)
        chosen = []
        for name in names:
            told = source.suffixes.get(_data_suffix(name))
            if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
                left_out.add("hidden", within + name)
            elif told is None and Path(name).suffix.lower() != ARCHIVE:
                left_out.add("with another suffix", within + name)
            elif told is not None and source.format not in (None, told):
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

    return choose


def _unpacked(path: Path | str, source: AnySource, place: str, left_out: LeftOut) -> list[Path | str]:
    """List the file itself, or the members of an archive that are the source's, sorted."""
    if file_name(path).suffix.lower() != ARCHIVE:
        return [path]
    members = list_zip(path, place)

    def locate(name: str) -> str:
        check_members(path, [name], place)
        return members[name]

    chosen = _chooser(source, place, left_out, locate)(sorted(members), str(path))
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
    told = source.suffixes.get(_data_suffix(file))
    if told is None:
        raise UserError(
            f"The format of `{file}` cannot be told from its suffix. Set `{place}.format` to one of "
            f"{', '.join(dict.fromkeys(source.suffixes.values()))}"
        )
    return told


def _data_suffix(file: Path | str) -> str:
    suffixes = [suffix.lower() for suffix in file_name(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
