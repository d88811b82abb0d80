"""Conversations of one file: records of JSON Lines, of a JSON array, or rows of parquet or Arrow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lightning_mixcn.text.byte_streams import DamagedFileError, OnRead, one_line, read_chunks, split_lines
from lightning_mixcn.text.conversations import EmptyTurnError, dump_conversation, read_training_conversation
from lightning_mixcn.text.tables import iterate_rows

if TYPE_CHECKING:
    from lightning_mixcn.text.sources import SourceFile

_SPACE = " \t\r\n"
_decoder = json.JSONDecoder()


def iterate_conversations(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead
) -> Iterator[tuple[int, bytes]]:
    """Read the conversations of a file in their order.

    Args:
        file: The file, its format, and the form of its records.
        on_bad_record: Called with the error of a record that is no conversation; if it returns, the record is left out.
        on_read: Called with how many bytes of the file, as it is stored, were read since the last call.

    Yields:
        Record, as in `iterate_documents`, and the conversation as `dump_conversation` writes it.

    Raises:
        DamagedFileError: The file cannot be read any further.
    """
    form = None if file.records == "any" else file.records
    unit = "row" if file.format in ("parquet", "arrow") else "line"
    for number, record in _records(file, on_bad_record, on_read):
        try:
            if not isinstance(record, Mapping):
                raise ValueError(f"expected an object, got a {type(record).__name__}")
            # A table has a column for what some records have; the others have null there.
            present = {key: value for key, value in record.items() if value is not None}
            encoded = dump_conversation(read_training_conversation(present, form, dict(file.roles)))
        except ValueError as error:
            kind = EmptyTurnError if isinstance(error, EmptyTurnError) else ValueError
            on_bad_record(kind(f"`{file.path}` {unit} {number}: {error}"))
        else:
            yield number, encoded


def _records(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead
) -> Iterator[tuple[int, Any]]:
    if file.format in ("parquet", "arrow"):
        return iterate_rows(file, on_bad_record, on_read)
    chunks = read_chunks(file.path, on_read)
    if file.format == "json":
        return _elements(b"".join(chunks), file)
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


def _elements(data: bytes, file: SourceFile) -> Iterator[tuple[int, Any]]:
    """Elements of a JSON array, and the line each begins in."""
    try:
        text = data.decode()
        place = _behind_space(text, 0)
        if text[place : place + 1] != "[":
            raise ValueError("expected an array of records; for one record a line set `format: jsonl`")
        place = _behind_space(text, place + 1)
        line, counted = 1, 0
        while text[place : place + 1] != "]":
            line, counted = line + text.count("\n", counted, place), place
            record, place = _decoder.raw_decode(text, place)
            yield line, record
            place = _behind_space(text, place)
            if text[place : place + 1] == ",":
                place = _behind_space(text, place + 1)
            elif text[place : place + 1] != "]":
                raise ValueError(f"expected a comma or the array's end behind the record of line {line}")
        if rest := text[place + 1 :].strip(_SPACE):
            raise ValueError(f"expected nothing behind the array, got {rest[:20]!r}")
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"`{file.path}` is not JSON: {one_line(error)}. Mend the file") from error


def _behind_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place
