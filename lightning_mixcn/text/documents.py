"""Documents of one file: JSON, text, parquet or Arrow, compressed or not; damage is named, never repaired."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from lightning_mixcn.text.byte_streams import DamagedFileError, OnRead, ignore_progress, read_chunks, split_lines
from lightning_mixcn.text.records import (
    JSON_DECODER,
    LINE_SPACE,
    MARK,
    RecordTally,
    is_blank,
    iterate_conversations,
    iterate_elements,
)
from lightning_mixcn.text.sources import SourceFile
from lightning_mixcn.text.tables import iterate_rows

OnBadRecord = Callable[[ValueError], None]

_MARK_BYTES = MARK.encode()


def refuse(error: ValueError) -> None:
    """Raise the error of a bad record."""
    raise error


def iterate_documents(
    file: SourceFile,
    on_bad_record: OnBadRecord = refuse,
    on_read: OnRead = ignore_progress,
    tally: RecordTally | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Read the documents of a file in their order, without those that are nothing but white space.

    White space includes characters of no width, such as U+200B. A byte order mark at the beginning of a document, as
    joined files have it, is dropped.

    Args:
        file: The file, its format and where the text is in it.
        on_bad_record: Called with the error of a record that is malformed or has no text, and of a damaged file; if
            it returns, the record, or the rest of the file, is left out.
        on_read: Called with how many bytes of the file, as it is stored, were read since the last call.
        tally: Counts what is left out for want of text, and the columns seen.

    Yields:
        Record and UTF-8 of each document. The record is the line where the document begins, counted from 1, or for
        parquet and Arrow the row, counted from 0.

    Raises:
        ValueError: The file lacks the column of the text, or what `on_bad_record` raises: by default any damage, in a
            message that names file and line or row.
    """
    tally = RecordTally() if tally is None else tally
    records = _records(file, on_bad_record, on_read, tally)
    unit = "row" if file.format in ("parquet", "arrow") else "line"
    try:
        for record, marked in records:
            encoded = marked
            while encoded.startswith(_MARK_BYTES):
                encoded = encoded.removeprefix(_MARK_BYTES)
            if encoded[:1] == b"\0" and not encoded.strip(b"\0"):
                on_bad_record(ValueError(f"`{file.path}` {unit} {record} is nothing but NUL bytes. Remove it"))
            elif _is_blank_utf8(encoded):
                tally.empty += 1
            else:
                yield record, encoded
    except DamagedFileError as error:
        on_bad_record(error)


def _is_blank_utf8(encoded: bytes) -> bool:
    # Of a long text the first character tells.
    start = encoded[:4].decode(errors="ignore")[:1]
    return is_blank(start) and is_blank(encoded.decode())


def _records(
    file: SourceFile, on_bad_record: OnBadRecord, on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, bytes]]:
    if file.records:
        return iterate_conversations(file, on_bad_record, on_read, tally)
    if file.format in ("parquet", "arrow"):
        return iterate_rows(file, on_bad_record, on_read, tally)
    chunks = read_chunks(file.path, on_read)
    if file.format == "jsonl":
        return _json_lines(split_lines(chunks), file, on_bad_record)
    if file.format == "json":
        return _json_array(chunks, file, on_bad_record)
    if file.document_unit == "file":
        return _whole(chunks, file, on_bad_record)
    if file.document_unit == "line":
        return _text_lines(split_lines(chunks), file, on_bad_record)
    return _blocks(split_lines(chunks), file, on_bad_record)


def _json_lines(
    lines: Iterator[tuple[int, bytes]], file: SourceFile, on_bad_record: OnBadRecord
) -> Iterator[tuple[int, bytes]]:
    text_key = file.text_key
    for number, line in lines:
        try:
            # What json.loads does, in half the time; of bytes it would let surrogates pass.
            line_text = line.decode().strip(LINE_SPACE)
            record, end = JSON_DECODER.raw_decode(line_text)
            encoded: bytes | None = record[text_key].encode() if end == len(line_text) else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            encoded = None
        if encoded is not None:
            yield number, encoded
        elif flaw := _json_flaw(line, text_key, f"`{file.path}` line {number}"):
            on_bad_record(flaw)


def _json_flaw(line: bytes, text_key: str, place: str) -> ValueError | None:
    """Tell why a line has no text, None if it is blank. A line must be an object whose `text_key` is valid Unicode."""
    if isinstance(text := _decode(line, place), ValueError):
        return text
    if is_blank(text):
        return None
    try:
        record = json.loads(text.strip(LINE_SPACE))
    except (ValueError, RecursionError) as error:
        return ValueError(f"{place} is not JSON: {error}. Mend the line, or remove it")
    encoded = _text_of(record, text_key, place)
    assert isinstance(encoded, ValueError), f"{place} has no flaw"
    return encoded


def _json_array(chunks: Iterator[bytes], file: SourceFile, on_bad_record: OnBadRecord) -> Iterator[tuple[int, bytes]]:
    """Texts of an array, whose elements are texts or objects with one."""
    for number, element in iterate_elements(b"".join(chunks), file):
        record = {file.text_key: element} if isinstance(element, str) else element
        encoded = _text_of(record, file.text_key, f"`{file.path}` line {number}")
        if isinstance(encoded, ValueError):
            on_bad_record(encoded)
        else:
            yield number, encoded


def _text_of(record: Any, text_key: str, place: str) -> bytes | ValueError:
    """UTF-8 of a record's text, or why it has none."""
    if not isinstance(record, dict):
        return ValueError(
            f'{place}: expected a JSON object such as {{"{text_key}": "…"}}, got a {type(record).__name__}'
        )
    if text_key not in record:
        keys = ", ".join(repr(key) for key in record) or "none"
        return ValueError(
            f"{place} has no key {text_key!r}. Set the source's `columns.text` or `text_key` to one of its keys: {keys}"
        )
    text = record[text_key]
    if not isinstance(text, str):
        return ValueError(
            f"{place}: expected a string under `text_key` {text_key!r}, got {type(text).__name__}. "
            "Mend the record, or remove it"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        return ValueError(f"{place}: the text is not valid Unicode: {error.reason} at {error.start}. Mend the record")


def _whole(chunks: Iterator[bytes], file: SourceFile, on_bad_record: OnBadRecord) -> Iterator[tuple[int, bytes]]:
    data = b"".join(chunks)
    text = _decode(data, f"`{file.path}`", count_lines=True)
    if isinstance(text, ValueError):
        on_bad_record(text)
    else:
        yield 1, data


def _text_lines(
    lines: Iterator[tuple[int, bytes]], file: SourceFile, on_bad_record: OnBadRecord
) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, without their line ends."""
    for number, line in lines:
        text = _decode(line, f"`{file.path}` line {number}")
        if isinstance(text, ValueError):
            on_bad_record(text)
        elif not is_blank(text):
            yield number, line.removesuffix(b"\r")


def _blocks(
    lines: Iterator[tuple[int, bytes]], file: SourceFile, on_bad_record: OnBadRecord
) -> Iterator[tuple[int, bytes]]:
    """Runs of lines between blank lines, joined by newlines; a run with a bad line is one bad record."""
    begin, block, is_bad = 0, list[bytes](), False
    for number, line in lines:
        text = _decode(line, f"`{file.path}` line {number}")
        if isinstance(text, ValueError) or not is_blank(text):
            begin = begin if block else number
            block.append(line.removesuffix(b"\r"))
            if isinstance(text, ValueError) and not is_bad:
                is_bad = True
                on_bad_record(text)
        elif block:
            if not is_bad:
                yield begin, b"\n".join(block)
            block, is_bad = [], False
    if block and not is_bad:
        yield begin, b"\n".join(block)


def _decode(data: bytes, place: str, *, count_lines: bool = False) -> str | ValueError:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        newlines = data.count(b"\n", 0, error.start)
        line = f" line {newlines + 1}" if count_lines else ""
        return ValueError(
            f"{place}{line} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}. Convert the file to UTF-8"
        )
    # English in UTF-16 is UTF-8, too: every other character is NUL.
    if "\0" in text:
        return ValueError(f"{place} has NUL bytes: UTF-16 without a mark? Convert the file to UTF-8")
    return text
