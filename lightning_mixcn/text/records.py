"""Records of one file, of JSON Lines, of a JSON array, or rows of parquet or Arrow, and conversations made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_mixcn.text.byte_streams import DamagedFileError, OnRead, one_line, read_chunks, split_lines
from lightning_mixcn.text.conversations import EmptyTurnError, dump_conversation, read_training_conversation
from lightning_mixcn.text.tables import iterate_rows

if TYPE_CHECKING:
    from lightning_mixcn.text.sources import SourceFile

_SPACE = " \t\r\n"
_decoder = json.JSONDecoder()


@dataclass
class RecordTally:
    """What is seen of a file's records beside those that become documents.

    Args:
        empty: Records without text, or with an answer without any: nothing to learn from, and no fault of the file.
        columns: Keys or columns named by the source's `columns` that some record has.
        keys: Keys of the first record, or all columns of a table.
    """

    empty: int = 0
    columns: set[str] = field(default_factory=set)
    keys: tuple[str, ...] = ()


def iterate_conversations(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, bytes]]:
    """Read the conversations of a file in their order.

    Args:
        file: The file, its format, the form of its records and their names of the form's keys.
        on_bad_record: Called with the error of a record that is no conversation; if it returns, the record is left out.
        on_read: Called with how many bytes of the file, as it is stored, were read since the last call.
        tally: Counts conversations with an answer of white space alone, which are left out.

    Yields:
        Record, as in `iterate_documents`, and the conversation as `dump_conversation` writes it.

    Raises:
        DamagedFileError: The file cannot be read any further.
    """
    form = None if file.records == "any" else file.records
    unit = "row" if file.format in ("parquet", "arrow") else "line"
    for number, record in _records(file, on_bad_record, on_read, tally):
        try:
            if not isinstance(record, Mapping):
                raise ValueError(f"expected an object, got a {type(record).__name__}")
            turns = read_training_conversation(_renamed(record, file.columns, tally), form, dict(file.roles))
        except EmptyTurnError:
            tally.empty += 1
        except ValueError as error:
            told = _absent_column(record, file, tally.keys) if isinstance(record, Mapping) else ""
            on_bad_record(ValueError(f"`{file.path}` {unit} {number}: {error}{told}"))
        else:
            yield number, dump_conversation(turns)


def _renamed(record: Mapping[str, Any], columns: Sequence[tuple[str, str]], tally: RecordTally) -> dict[str, Any]:
    """The record with the keys of its form, without those that are null, as a table has for what a record lacks."""
    tally.keys = tally.keys or tuple(map(str, record))
    tally.columns.update(name for _, name in columns if name in record)
    present = [(key, name) for key, name in columns if name in record]
    named = {key: record[name] for key, name in present}
    # A key that takes another's value, or gives its own away, does not keep its own.
    moved = {name for pair in present for name in pair}
    kept = {key: value for key, value in record.items() if key not in moved}
    return {key: value for key, value in {**kept, **named}.items() if value is not None}


def _absent_column(record: Mapping[str, Any], file: SourceFile, table: tuple[str, ...]) -> str:
    """What to add to an error of a record that lacks a key which `columns` names."""
    for key, name in file.columns:
        if name not in record:
            keys = table if file.format in ("parquet", "arrow") else record
            return f". `columns.{key}` names {name!r}, but its keys are {', '.join(map(repr, keys)) or 'none'}"
    return ""


def _records(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, Any]]:
    if file.format in ("parquet", "arrow"):
        return iterate_rows(file, on_bad_record, on_read, tally)
    chunks = read_chunks(file.path, on_read)
    if file.format == "json":
        return iterate_elements(b"".join(chunks), file)
    return _lines(split_lines(chunks), file, on_bad_record)


def _lines(
    lines: Iterator[tuple[int, bytes]], file: SourceFile, on_bad_record: Callable[[ValueError], None]
) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        try:
            if text := line.decode().strip(_SPACE):
                yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            on_bad_record(ValueError(f"`{file.path}` line {number} is not JSON: {one_line(error)}. Mend the line"))


def iterate_elements(data: bytes, file: SourceFile) -> Iterator[tuple[int, Any]]:
    """Read the elements of a JSON array.

    Args:
        data: The whole file, decompressed.
        file: The file, for errors.

    Yields:
        Line in which the element begins, counted from 1, and the element.

    Raises:
        DamagedFileError: The rest of the array cannot be read; it says how much that is.
    """
    text, place = "", 0
    try:
        text = data.decode()
        place = _after_space(text, 0)
        if text[place : place + 1] != "[":
            raise ValueError("expected an array of records; for one record a line set `format: jsonl`")
        place = _after_space(text, place + 1)
        line, counted = 1, 0
        while text[place : place + 1] != "]":
            line, counted = line + text.count("\n", counted, place), place
            record, end = _decoder.raw_decode(text, place)
            yield line, record
            place = _after_space(text, end)
            if text[place : place + 1] == ",":
                place = _after_space(text, place + 1)
            elif text[place : place + 1] != "]":
                raise ValueError(f"expected a comma or the array's end behind the record of line {line}")
        if rest := text[place + 1 :].strip(_SPACE):
            raise ValueError(f"expected nothing behind the array, got {rest[:20]!r}")
    except (ValueError, RecursionError) as error:
        unread = len(text[place:].encode()) / len(data) if text else 1.0
        raise DamagedFileError(f"`{file.path}` is not JSON: {one_line(error)}. Mend the file", unread) from error


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place
