"""Sources of text and conversations, as a configuration has them: named, weighted sets of files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np

from lightning_mixcn.arguments import Between, Filled, Name, check_arguments
from lightning_mixcn.errors import UserError, did_you_mean
from lightning_mixcn.masking import MASK
from lightning_mixcn.text.chat.preferences import PREFERENCE_KEYS
from lightning_mixcn.text.chat.records import OBEYED_KEYS, RecordFormat
from lightning_mixcn.text.chat.turns import Role

TextFormat = Literal["jsonl", "text", "parquet", "arrow", "json"]
RecordFileFormat = Literal["json", "jsonl", "parquet", "arrow"]
DocumentUnit = Literal["file", "line", "blank-line"]

DEFAULT_KEY = "text"
MAX_DOCUMENT_BYTES = 64 << 20
_RECORDS: dict[str, Any] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}


_LEAVE_OUT = "(remove the source to leave it out)"


class ByProgress:
    """Bound of weights by fractions of the run."""

    def expected(self, value: Mapping[float | str, float]) -> str | None:
        """Say what fractions and weights have to be."""
        try:
            fractions = [float(fraction) for fraction in value]
        except ValueError:
            fractions = []
        is_increasing = all(first < second for first, second in itertools.pairwise(fractions))
        if not fractions or not is_increasing or not 0 <= min(fractions) <= max(fractions) <= 1:
            return "fractions of the run from 0 to 1 in increasing order, each with a weight, as {0.0: 0.5, 0.2: 0.9}"
        return None if any(value.values()) else f"a weight of more than 0 at one of the fractions {_LEAVE_OUT}"


_Fixed = Annotated[float, Between(0, 10**9, _LEAVE_OUT, excluded=(0,))]
_Points = Annotated[dict[float | str, Annotated[float, Between(0, 10**9)]], ByProgress()]
Weight = _Fixed | _Points
Epochs = Annotated[int, Between(1, 10**6, "(null is for ever)")]
DocumentBytes = Annotated[int, Between(1, 2**40, "byte")]
Places = Annotated[str | list[Name], Filled("a file, a folder, a glob, or a list of these")]


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
            `weight_unit`, in bytes; or weights by fraction of the run, such as `{0.0: 0.5, 0.2: 0.9}`: linear between
            them, constant before the first and after the last one.
        format: Format of the files; null tells it from each file's suffix, before `.gz`, `.zst`, `.bz2` or `.xz`.
            `json` is one array of records or of texts, which is held in memory while it is unpacked.
        text_key: JSON key, or parquet or Arrow column, that holds a document's text.
        document_unit: Unit of a text file that is one document: the whole file, a line, or a block between blank lines.
        max_epochs: Times that the training set of this source is read before it stops; null repeats it for ever.
        columns: Name that the records have for `text`, such as `{text: content}`: the same as `text_key`, so give one.
        max_document_bytes: Largest size of a document and of the record that holds it, in bytes of UTF-8; a larger one
            is a bad record, of which no more than this is held in memory. The default is far above any page or book.
    """

    name: Name
    path: Places
    weight: Weight = 1.0
    format: TextFormat | None = None
    text_key: Name = DEFAULT_KEY
    document_unit: DocumentUnit = "file"
    max_epochs: Epochs | None = None
    columns: dict[str, Name] | None = None
    max_document_bytes: DocumentBytes = MAX_DOCUMENT_BYTES

    suffixes: ClassVar[dict[str, TextFormat]] = {**_RECORDS, ".txt": "text", ".text": "text"}
    keys: ClassVar[frozenset[str]] = frozenset({DEFAULT_KEY})
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
        weight: Share of the training tokens relative to the other sources' weights; or weights by fraction of the run,
            such as `{0.0: 0.5, 0.2: 0.9}`: linear between them, constant before the first and after the last one.
        format: Format of the files; null tells it from each file's suffix. `json` is one array of records, which is
            held in memory while it is unpacked.
        records: Form of the records; null tells it from each record's keys. `alpaca` has `instruction`, `input`,
            `output` and perhaps `system` and `history`; `sharegpt` has `conversations`; `messages` has `messages`.
        roles: Meanings of the records' roles, as `user`, `assistant` or `system`, beside those known (human, user, gpt,
            chatgpt, assistant, system), such as `{tool: user, developer: system}`; a role without a meaning is a bad
            record.
        max_epochs: Times that the training set of this source is read before it stops; null repeats it for ever.
        columns: Names that the records have for keys of their form, such as `{instruction: input, output: target}` for
            records that have a question in `input` and its answer in `target`.
        max_document_bytes: Largest size of a record, in bytes of UTF-8; a larger one is a bad record, of which no more
            than this is held in memory.
    """

    name: Name
    path: Places
    weight: Weight = 1.0
    format: RecordFileFormat | None = None
    records: RecordFormat | None = None
    roles: dict[str, Role] | None = None
    max_epochs: Epochs | None = None
    columns: dict[str, Name] | None = None
    max_document_bytes: DocumentBytes = MAX_DOCUMENT_BYTES

    suffixes: ClassVar[dict[str, RecordFileFormat]] = _RECORDS
    keys: ClassVar[frozenset[str]] = OBEYED_KEYS
    text_key: ClassVar[str] = ""
    document_unit: ClassVar[DocumentUnit] = "file"


@dataclass(frozen=True)
class PreferenceSource:
    """A named set of files of answers that were compared or judged.

    Args:
        name: Short name, unique in its list; it appears in TensorBoard tags such as `val/<name>/accuracy`.
        path: A file, a folder (searched recursively for known suffixes, through links too), a zip archive, a glob with
            `*` and `**`, one of these as an URL that fsspec has a driver for, or a list of these. A file is read once,
            however many of them lead to it.
        weight: Share of the training tokens relative to the other sources' weights.
        format: Format of the files; null tells it from each file's suffix. `json` is one array of records, which is
            held in memory while it is unpacked.
        roles: Meanings of the records' roles, as `user`, `assistant` or `system`, beside those known (human, user, gpt,
            chatgpt, assistant, system), such as `{tool: user, developer: system}`.
        max_epochs: Times that the training set of this source is read before it stops; null repeats it for ever.
        columns: Names that the records have for keys that are read, such as `{prompt: question, chosen: better,
            rejected: worse}`.
        max_document_bytes: Largest size of a record, in bytes of UTF-8; a larger one is a bad record, of which no more
            than this is held in memory.
    """

    name: Name
    path: Places
    weight: Weight = 1.0
    format: RecordFileFormat | None = None
    roles: dict[str, Role] | None = None
    max_epochs: Epochs | None = None
    columns: dict[str, Name] | None = None
    max_document_bytes: DocumentBytes = MAX_DOCUMENT_BYTES

    suffixes: ClassVar[dict[str, RecordFileFormat]] = _RECORDS
    keys: ClassVar[frozenset[str]] = PREFERENCE_KEYS
    records: ClassVar[Literal["preference"]] = "preference"
    text_key: ClassVar[str] = ""
    document_unit: ClassVar[DocumentUnit] = "file"


AnySource = Source | ConversationSource | PreferenceSource
SourceKind = TypeVar("SourceKind", Source, ConversationSource, PreferenceSource)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Args:
        path: File; a string if it is an URL or in a zip archive.
        format: Format of the file, given or known by its suffix.
        text_key: JSON key, or parquet or Arrow column, of the text.
        document_unit: Unit of a text file that is one document.
        records: Form of the records if they are conversations, `any` to read each as what it is; `preference` if they
            have answers that were compared; None if they are text.
        roles: Pairs of a role of the records and what it means.
        columns: For conversations, pairs of a key that their form expects and the records' name of it.
        max_document_bytes: Largest size of a record and of its text.
    """

    path: Path | str
    format: TextFormat | RecordFileFormat
    text_key: str
    document_unit: DocumentUnit
    records: RecordFormat | Literal["any", "preference"] | None = None
    roles: tuple[tuple[str, str], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    max_document_bytes: int = MAX_DOCUMENT_BYTES


def parse_sources(
    entries: Sequence[SourceKind | Mapping[str, Any]], argument: str, kind: type[SourceKind]
) -> tuple[SourceKind, ...]:
    """Check sources and turn dictionaries, as a YAML has them, into sources.

    Args:
        entries: Sources, or mappings with their fields.
        argument: Name of the argument they came from, for errors.
        kind: Class of the sources.

    Returns:
        The sources in the same order.

    Raises:
        ValueError: An unknown or missing field, a duplicate name, or a value out of range.
    """
    sources: list[SourceKind] = []
    first: dict[str, int] = {}
    known = [field.name for field in fields(kind)]
    for index, entry in enumerate(entries):
        place = f"{argument}[{index}]"
        if isinstance(entry, Mapping):
            if unknown := [key for key in entry if key not in known]:
                near = did_you_mean(str(unknown[0]), known)
                raise UserError(f"`{place}` has the unknown key {unknown[0]!r}{near}. Known keys: {', '.join(known)}")
            if missing := [key for key in ("name", "path") if key not in entry]:
                raise UserError(f"`{place}` has no `{missing[0]}`. Give at least name and path")
        source = kind(**entry) if isinstance(entry, Mapping) else entry
        if not isinstance(source, kind):
            raise UserError(f"`{place}` is a {type(source).__name__}: expected a {kind.__name__}")
        _check(source, place)
        if (other := first.setdefault(source.name, index)) != index:
            raise UserError(
                f"`{place}.name={source.name!r}` is already the name of `{argument}[{other}]`. "
                "Give each source a name of its own, or one source a list of paths."
            )
        sources.append(source)
    for fraction in sorted({fraction for source in sources for fraction in weight_points(source.weight)[0]}):
        if not any(weight_at(source.weight, fraction) for source in sources):
            raise UserError(
                f"`{argument}`: at {fraction:g} of the run every `weight` is 0. Give one source a weight there"
            )
    return tuple(sources)


def weight_points(weight: Weight) -> tuple[list[float], list[float]]:
    """Return the fractions of the run at which a weight is given, and the weights there; a constant one has one."""
    if not isinstance(weight, Mapping):
        return [0.0], [float(weight)]
    return [float(fraction) for fraction in weight], [float(value) for value in weight.values()]


def weight_at(weight: Weight, fraction: float) -> float:
    """Return a weight at a fraction of the run.

    >>> weight_at({0.0: 0.5, 0.2: 0.9}, 0.1)
    0.7
    """
    return float(np.interp(fraction, *weight_points(weight)))


def _check(source: AnySource, place: str) -> None:
    check_arguments(type(source), vars(source), f"{place}.")
    if MASK in str(source.path):
        raise UserError(f"`{place}.path={source.path!r}` is masked, as a run wrote it. Give the whole URL again")
    renamed = sorted(source.keys)
    keyed = not isinstance(source, Source) or not source.columns or source.text_key == DEFAULT_KEY
    expectations = {
        "name": ("/" not in source.name, "a name without a slash (it is part of TensorBoard tags)"),
        "columns": (
            all(key in renamed for key in source.columns or {}),
            f"null, or the records' name of each of these keys that is another: {', '.join(renamed)}",
        ),
        "text_key": (keyed, f"null, or no `columns`: both name the text, and `columns={source.columns}`"),
    }
    for field, (holds, expected) in expectations.items():
        if not holds:
            raise UserError(f"`{place}.{field}={getattr(source, field)!r}`: expected {expected}")
