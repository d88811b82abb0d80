"""Where text and conversations come from: named, weighted sources of files, listed in a fixed order."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from lightning_mixcn.text.chat_template import ROLES
from lightning_mixcn.text.conversations import RecordFormat
from lightning_mixcn.text.files import is_url, match_urls

TextFormat = Literal["jsonl", "text", "parquet", "arrow"]
RecordFileFormat = Literal["json", "jsonl", "parquet", "arrow"]
DocumentUnit = Literal["file", "line", "blank-line"]

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_TABLES: dict[str, Any] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
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
        path: A file, a folder (searched recursively for known suffixes), a glob with `*` and `**`, one of these as an
            URL that fsspec has a driver for, such as `s3://bucket/zh/*.jsonl.gz`, or a list of these.
        weight: Share of the training text relative to the other sources' weights, in tokens or, by the data module's
            `weight_unit`, in bytes.
        format: Format of the files; null tells it from each file's suffix, before `.gz`, `.zst`, `.bz2` or `.xz`.
        text_key: JSONL key, or parquet or Arrow column, that holds a document's text.
        document_unit: What one document is in a text file: the whole file, a line, or a block between blank lines.
        max_epochs: How often the training set of this source is read before it stops; null repeats it for ever.
    """

    name: str
    path: str | list[str]
    weight: float = 1.0
    format: TextFormat | None = None
    text_key: str = "text"
    document_unit: DocumentUnit = "file"
    max_epochs: int | None = None

    suffixes: ClassVar[dict[str, TextFormat]] = {**_TABLES, ".txt": "text", ".text": "text"}
    records: ClassVar[None] = None
    roles: ClassVar[None] = None


@dataclass(frozen=True)
class ConversationSource:
    """A named set of files of conversations.

    Args:
        name: Short name, unique in its list; it appears in TensorBoard tags such as `val/<name>/bits_per_byte`.
        path: A file, a folder (searched recursively for known suffixes), a glob with `*` and `**`, one of these as an
            URL that fsspec has a driver for, or a list of these.
        weight: Share of the training tokens relative to the other sources' weights.
        format: Format of the files; null tells it from each file's suffix. `json` is one array of records, which is
            held in memory while it is unpacked.
        records: Form of the records; null tells it from each record's keys. `alpaca` has `instruction`, `input`,
            `output` and perhaps `system` and `history`; `sharegpt` has `conversations`; `messages` has `messages`.
        roles: What roles of the records mean, as `user`, `assistant` or `system`, beside those known (human, user, gpt,
            chatgpt, assistant, system), such as `{tool: user, developer: system}`; a role without a meaning is a bad
            record.
        max_epochs: How often the training set of this source is read before it stops; null repeats it for ever.
    """

    name: str
    path: str | list[str]
    weight: float = 1.0
    format: RecordFileFormat | None = None
    records: RecordFormat | None = None
    roles: dict[str, str] | None = None
    max_epochs: int | None = None

    suffixes: ClassVar[dict[str, RecordFileFormat]] = {".json": "json", **_TABLES}
    text_key: ClassVar[str] = ""
    document_unit: ClassVar[DocumentUnit] = "file"


AnySource = Source | ConversationSource
SourceKind = TypeVar("SourceKind", Source, ConversationSource)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Args:
        path: The file; a string if it is an URL.
        format: Its format, given or told from the suffix.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: What one document is in a text file.
        records: Form of the records if they are conversations, `any` tells it from each record; None if they are text.
        roles: Pairs of a role of the records and what it means.
    """

    path: Path | str
    format: TextFormat | RecordFileFormat
    text_key: str
    document_unit: DocumentUnit
    records: RecordFormat | Literal["any"] | None = None
    roles: tuple[tuple[str, str], ...] = ()


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
            raise ValueError(
                f"`{argument}[{index}].name={source.name!r}` is already the name of `{argument}[{other}]`. "
                "Give each source a name of its own, or one source a list of paths."
            )
    return sources


def _parse(entry: SourceKind | Mapping[str, Any], place: str, kind: type[SourceKind]) -> SourceKind:
    if isinstance(entry, Mapping):
        known = [field.name for field in fields(kind)]
        if unknown := [key for key in entry if key not in known]:
            raise ValueError(f"`{place}` has the unknown key {unknown[0]!r}. Known keys: {', '.join(known)}")
        if missing := [key for key in ("name", "path") if key not in entry]:
            raise ValueError(f"`{place}` has no `{missing[0]}`. Give at least name and path")
        entry = kind(**entry)
    if not isinstance(entry, kind):
        raise ValueError(f"`{place}` is a {type(entry).__name__}: expected a {kind.__name__}")
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
    if isinstance(source, Source):
        keyed = isinstance(source.text_key, str) and bool(source.text_key)
        expectations["text_key"] = (keyed, "the key or column of the text")
    else:
        expectations["roles"] = (_are_roles(source.roles), f"roles and what each means, one of {', '.join(ROLES)}")
    for field, (holds, expected) in expectations.items():
        if not holds:
            raise ValueError(f"`{place}.{field}={getattr(source, field)!r}`: expected {expected}")


def _are_roles(roles: Any) -> bool:
    if roles is None:
        return True
    return isinstance(roles, Mapping) and all(isinstance(name, str) and role in ROLES for name, role in roles.items())


def list_files(source: AnySource, place: str = "sources[0]") -> list[SourceFile]:
    """List the files of a source: each pattern's matches sorted by path, each file once.

    Args:
        source: The source.
        place: How the configuration names it, for errors.

    Returns:
        At least one file.

    Raises:
        FileNotFoundError: A path matches no file.
        ValueError: An URL cannot be listed, or a file's format is neither given nor told by its suffix.
    """
    patterns = [source.path] if isinstance(source.path, str) else source.path
    found = [path for pattern in patterns for path in _match(pattern, source, place)]
    records = None if isinstance(source, Source) else source.records or "any"
    roles = tuple(sorted((source.roles or {}).items()))
    files = [
        SourceFile(
            path,
            source.format or _format_of(path, source, place),
            source.text_key,
            source.document_unit,
            records,
            roles,
        )
        for path in dict.fromkeys(found)
    ]
    if source.document_unit != "file" and not any(file.format == "text" for file in files):
        raise ValueError(
            f"`{place}.document_unit={source.document_unit!r}` says what a document is in a text file, but no file of "
            "this source is text. Remove it, or set `format: text`"
        )
    return files


def _match(pattern: str, source: AnySource, place: str) -> list[Path] | list[str]:
    if is_url(pattern):
        return match_urls(pattern, place, lambda relative: _belongs(relative, source))
    expanded = Path(pattern).expanduser()
    if expanded.is_file():
        return [expanded]
    if expanded.is_dir():
        files = sorted(
            file for file in expanded.rglob("*") if _belongs(file.relative_to(expanded), source) and file.is_file()
        )
        if not files:
            raise FileNotFoundError(
                f"`{place}.path={pattern!r}` is a folder without any {' '.join(source.suffixes)} file "
                f"(nor one with {' '.join(COMPRESSIONS)} behind). Give a glob and `format` for other suffixes"
            )
        return files
    files = sorted(Path(match) for match in glob.glob(str(expanded), recursive=True) if Path(match).is_file())
    if not files:
        raise FileNotFoundError(
            f"`{place}.path={pattern!r}` matches no file. Give a file, a folder or a glob, e.g. data/zh/*.jsonl.gz"
        )
    return files


def _belongs(relative: Path, source: AnySource) -> bool:
    """Whether a file found in a folder is one of the source: known suffix, the source's format, nothing hidden."""
    hidden = any(part.startswith(".") for part in relative.parts)
    told = source.suffixes.get(_data_suffix(relative))
    return not hidden and told is not None and source.format in (None, told)


def _format_of(file: Path | str, source: AnySource, place: str) -> TextFormat | RecordFileFormat:
    told = source.suffixes.get(_data_suffix(file))
    if told is None:
        raise ValueError(
            f"The format of `{file}` cannot be told from its suffix. Set `{place}.format` to one of "
            f"{', '.join(dict.fromkeys(source.suffixes.values()))}"
        )
    return told


def _data_suffix(file: Path | str) -> str:
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
