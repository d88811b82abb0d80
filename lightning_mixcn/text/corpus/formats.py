"""Read the documents of one file: JSON, text, parquet or Arrow, compressed or not; damage is named, never repaired."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_mixcn.errors import UserError, one_line
from lightning_mixcn.text.chat.preferences import (
    LoneVerdictError,
    Preference,
    dump_preference,
    read_preference,
    with_mismatched_answers,
)
from lightning_mixcn.text.chat.records import (
    EmptyTurnError,
    dump_conversation,
    read_training_conversation,
)

from .reading import DamagedFileError, OnRead, ignore_progress, read_chunks, read_whole, split_lines
from .sources import SourceFile
from .store import TABLES, RecordTally
from .tables import iterate_rows

# A byte order mark at the beginning of a text is left of the file that it was read from; inside of one it is text.
MARK = "\ufeff"
# Zero-width space, non-joiner, joiner, word joiner and mark: nothing that is seen, but not white space to Python.
_INVISIBLE = f"\u200b\u200c\u200d\u2060{MARK}"
_JSON_SPACE = " \t\r\n"
# Joined files have a mark at the beginning of a line.
LINE_SPACE = _JSON_SPACE + MARK
JSON_DECODER = json.JSONDecoder()
# An array is parsed as a whole, so it is held as a whole.
_ARRAY_BYTES = 1 << 30


def is_blank(text: str) -> bool:
    """Tell whether a text is nothing but white space and characters of no width."""
    return all(character.isspace() or character in _INVISIBLE for character in text)


def iterate_conversations(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, bytes]]:
    """Read the conversations of a file in their order.

    Args:
        file: File, its format, the form of its records and their names of the form's keys.
        on_bad_record: Called with the error of a record that is no conversation; if it returns, the record is left out.
        on_read: Called with how many bytes of the file, as it is stored, were read since the last call.
        tally: Counts conversations with an answer of white space alone, which are left out.

    Yields:
        Record, as in `iterate_documents`, and the conversation as `dump_conversation` writes it.

    Raises:
        DamagedFileError: The file cannot be read any further.
    """
    assert file.records != "preference"
    form = None if file.records == "any" else file.records
    unit = "row" if file.format in TABLES else "line"
    for number, record in iterate_records(file, on_bad_record, on_read, tally):
        try:
            if not isinstance(record, Mapping):
                raise UserError(f"expected an object, got a {type(record).__name__}")
            turns = read_training_conversation(_renamed(record, file.columns, tally), form, dict(file.roles))
        except EmptyTurnError:
            tally.empty_records += 1
        except ValueError as error:
            told = _with_own_columns(str(error), record, file, tally) if isinstance(record, Mapping) else str(error)
            on_bad_record(UserError(f"`{file.path}` {unit} {number}: {told}"))
        else:
            turns = [replace(turn, content=turn.content.lstrip(MARK)) for turn in turns]
            if any(turn.role != "system" and is_blank(turn.content) for turn in turns):
                tally.empty_records += 1
            else:
                yield number, dump_conversation(turns)


def iterate_preferences(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, bytes]]:
    """Read the preferences of a file in their order, as `iterate_conversations` reads conversations."""
    read = _preferences(file, on_bad_record, on_read, tally)
    try:
        for number, preference in with_mismatched_answers(read):
            yield number, dump_preference(preference)
    except LoneVerdictError as error:
        on_bad_record(UserError(f"`{file.path}`: {error}"))


def _preferences(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, Preference]]:
    unit = "row" if file.format in TABLES else "line"
    for number, record in iterate_records(file, on_bad_record, on_read, tally):
        try:
            if not isinstance(record, Mapping):
                raise UserError(f"expected an object, got a {type(record).__name__}")
            yield number, read_preference(_renamed(record, file.columns, tally), dict(file.roles))
        except ValueError as error:
            told = _with_own_columns(str(error), record, file, tally) if isinstance(record, Mapping) else str(error)
            on_bad_record(UserError(f"`{file.path}` {unit} {number}: {told}"))


def _renamed(record: Mapping[str, Any], columns: Sequence[tuple[str, str]], tally: RecordTally) -> dict[str, Any]:
    """Give a record the keys of its form, without those that are null, as a table has for what a record lacks."""
    tally.keys = tally.keys or tuple(map(str, record))
    tally.columns.update(name for _, name in columns if name in record)
    present = [(key, name) for key, name in columns if name in record]
    named = {key: record[name] for key, name in present}
    # A key that takes another's value, or gives its own away, does not keep its own.
    moved = {name for pair in present for name in pair}
    kept = {key: value for key, value in record.items() if key not in moved}
    return {key: value for key, value in {**kept, **named}.items() if value is not None}


def _with_own_columns(message: str, record: Mapping[str, Any], file: SourceFile, tally: RecordTally) -> str:
    """Say an error in the record's own keys; add the column that it lacks if the error is about that one."""
    subject = message.partition("its keys are")[0]
    own = {key: name for key, name in file.columns if name in record}
    told = re.sub(r"(?<=`)\w+(?=[`.=\[])", lambda found: own.get(found[0], found[0]), message)
    if renamed := ", ".join(map(repr, _renamed(record, file.columns, tally))):
        told = told.replace(renamed, ", ".join(repr(key) for key, value in record.items() if value is not None))
    for key, name in file.columns:
        if name not in record and re.search(rf"[`']{re.escape(key)}[`'.=\[]", subject):
            keys = tally.keys if file.format in TABLES else record
            return f"{told}. `columns.{key}` names {name!r}, but its keys are {', '.join(map(repr, keys)) or 'none'}"
    return told


def iterate_records(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, Any]]:
    """Read the records of a file as JSON or the table has them; arguments and errors as in `iterate_conversations`."""
    if file.format in TABLES:
        return iterate_rows(file, on_bad_record, on_read, tally)
    chunks = read_chunks(file.path, on_read)
    if file.format == "json":
        return iterate_elements(_array(chunks, file), file)
    return _lines(split_lines(chunks, file.max_document_bytes), file, on_bad_record)


def _array(chunks: Iterator[bytes], file: SourceFile) -> bytes:
    largest = max(_ARRAY_BYTES, file.max_document_bytes)
    if (data := read_whole(chunks, largest)) is None:
        told = f"is more than {largest:,} bytes of JSON, which would be held in memory. Convert it to one record a line"
        raise DamagedFileError(f"`{file.path}` {told} (`format: jsonl`), or raise the source's `max_document_bytes`")
    return data


def _too_large(place: str, file: SourceFile) -> UserError:
    return UserError(
        f"{place} is larger than `max_document_bytes={file.max_document_bytes}`. Raise the source's "
        "`max_document_bytes`, or set `on_bad_record: skip` to leave such records out"
    )


def _lines(
    lines: Iterator[tuple[int, bytes | None]], file: SourceFile, on_bad_record: Callable[[ValueError], None]
) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if line is None:
            on_bad_record(_too_large(f"`{file.path}` line {number}", file))
            continue
        try:
            if text := line.decode().strip(LINE_SPACE):
                yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            on_bad_record(UserError(f"`{file.path}` line {number} is not JSON: {one_line(error)}. Mend the line"))


def iterate_elements(data: bytes, file: SourceFile) -> Iterator[tuple[int, Any]]:
    """Read the elements of a JSON array.

    Args:
        data: Contents of the whole file, decompressed.
        file: File of the data, for errors.

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
            raise _no_array(text[place:], file)
        place = _after_space(text, place + 1)
        line, counted = 1, 0
        while text[place : place + 1] != "]":
            line, counted = line + text.count("\n", counted, place), place
            record, end = JSON_DECODER.raw_decode(text, place)
            yield line, record
            place = _after_space(text, end)
            if text[place : place + 1] == ",":
                place = _after_space(text, place + 1)
            elif text[place : place + 1] != "]":
                raise UserError(f"expected a comma or the array's end after the record of line {line}")
        if rest := text[place + 1 :].strip(_JSON_SPACE):
            raise UserError(f"expected nothing after the array, got {rest[:20]!r}")
    except DamagedFileError:
        raise
    except (ValueError, RecursionError) as error:
        unread = len(text[place:].encode()) / len(data) if text else 1.0
        raise DamagedFileError(f"`{file.path}` is not JSON: {one_line(error)}. Mend the file", unread) from error


def _no_array(text: str, file: SourceFile) -> DamagedFileError:
    if text.startswith("{"):
        told = "a JSON object: expected an array of records. Set the source's `format: jsonl`, or give a glob that "
        return DamagedFileError(f"`{file.path}` is {told}leaves it out", 1.0)
    got = repr(text[:20]) if text else "nothing"
    return DamagedFileError(
        f"`{file.path}` is no JSON array: expected an array of records, got {got}. Mend the file", 1.0
    )


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _JSON_SPACE:
        place += 1
    return place


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
        file: File, its format and where the text is in it.
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
    unit = "row" if file.format in TABLES else "line"
    try:
        for record, marked in records:
            encoded = marked
            while encoded.startswith(_MARK_BYTES):
                encoded = encoded.removeprefix(_MARK_BYTES)
            if encoded[:1] == b"\0" and not encoded.strip(b"\0"):
                on_bad_record(UserError(f"`{file.path}` {unit} {record} is nothing but NUL bytes. Remove it"))
            elif len(encoded) > file.max_document_bytes:
                on_bad_record(_too_large(f"`{file.path}` {unit} {record}", file))
            elif _is_blank_utf8(encoded):
                tally.empty_records += 1
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
    if file.records == "preference":
        return iterate_preferences(file, on_bad_record, on_read, tally)
    if file.records:
        return iterate_conversations(file, on_bad_record, on_read, tally)
    if file.format in TABLES:
        return iterate_rows(file, on_bad_record, on_read, tally)
    chunks = read_chunks(file.path, on_read)
    if file.format == "json":
        return _json_array(chunks, file, on_bad_record)
    if file.format == "text" and file.document_unit == "file":
        return _whole(chunks, file, on_bad_record)
    lines = split_lines(chunks, file.max_document_bytes)
    if file.format == "jsonl":
        return _json_lines(lines, file, on_bad_record)
    return (_text_lines if file.document_unit == "line" else _blocks)(lines, file, on_bad_record)


def _json_lines(
    lines: Iterator[tuple[int, bytes | None]], file: SourceFile, on_bad_record: OnBadRecord
) -> Iterator[tuple[int, bytes]]:
    text_key = file.text_key
    for number, line in lines:
        if line is None:
            on_bad_record(_too_large(f"`{file.path}` line {number}", file))
            continue
        try:
            # As json.loads, in half the time; of bytes it would let surrogates pass.
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
        return UserError(f"{place} is not JSON: {error}. Mend the line, or remove it")
    encoded = _text_of(record, text_key, place)
    assert isinstance(encoded, ValueError), f"{place} has no flaw"
    return encoded


def _json_array(chunks: Iterator[bytes], file: SourceFile, on_bad_record: OnBadRecord) -> Iterator[tuple[int, bytes]]:
    """Read the texts of an array, whose elements are texts or objects with one."""
    for number, element in iterate_elements(_array(chunks, file), file):
        record = {file.text_key: element} if isinstance(element, str) else element
        encoded = _text_of(record, file.text_key, f"`{file.path}` line {number}")
        if isinstance(encoded, ValueError):
            on_bad_record(encoded)
        else:
            yield number, encoded


def _text_of(record: Any, text_key: str, place: str) -> bytes | ValueError:
    """Return the UTF-8 of a record's text, or the reason why it has none."""
    if not isinstance(record, dict):
        return UserError(
            f'{place}: expected a JSON object such as {{"{text_key}": "…"}}, got a {type(record).__name__}'
        )
    if text_key not in record:
        keys = ", ".join(repr(key) for key in record) or "none"
        return UserError(
            f"{place} has no key {text_key!r}. Set the source's `columns.text` or `text_key` to one of its keys: {keys}"
        )
    text = record[text_key]
    if not isinstance(text, str):
        return UserError(
            f"{place}: expected a string under `text_key` {text_key!r}, got {type(text).__name__}. "
            "Mend the record, or remove it"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        return UserError(f"{place}: the text is not valid Unicode: {error.reason} at {error.start}. Mend the record")


def _whole(chunks: Iterator[bytes], file: SourceFile, on_bad_record: OnBadRecord) -> Iterator[tuple[int, bytes]]:
    data = read_whole(chunks, file.max_document_bytes)
    if data is None:
        told = "as one document, the whole file. Set `document_unit: line` or `blank-line`, or raise"
        raise DamagedFileError(
            f"`{file.path}` is larger than `max_document_bytes={file.max_document_bytes}` {told} `max_document_bytes`"
        )
    text = _decode(data, f"`{file.path}`", count_lines=True)
    if isinstance(text, ValueError):
        on_bad_record(text)
    else:
        yield 1, data


def _text_lines(
    lines: Iterator[tuple[int, bytes | None]], file: SourceFile, on_bad_record: OnBadRecord
) -> Iterator[tuple[int, bytes]]:
    """Read the lines that are not blank, without their line ends."""
    for number, line in lines:
        text = _decode_line(line, number, file)
        if isinstance(text, ValueError):
            on_bad_record(text)
        elif not is_blank(text):
            yield number, (line or b"").removesuffix(b"\r")


def _blocks(
    lines: Iterator[tuple[int, bytes | None]], file: SourceFile, on_bad_record: OnBadRecord
) -> Iterator[tuple[int, bytes]]:
    """Read runs of lines between blank lines, joined by newlines; a run with a bad line is one bad record."""
    begin, block, size, is_bad = 0, list[bytes](), 0, False
    for number, line in lines:
        text = _decode_line(line, number, file)
        if isinstance(text, ValueError) or not is_blank(text):
            begin = begin or number
            size += len(line or b"")
            if isinstance(text, str) and size > file.max_document_bytes:
                text = _too_large(f"`{file.path}` line {begin}", file)
            if isinstance(text, ValueError):
                if not is_bad:
                    on_bad_record(text)
                block, is_bad = [], True
            if not is_bad:
                block.append((line or b"").removesuffix(b"\r"))
        else:
            if block:
                yield begin, b"\n".join(block)
            begin, block, size, is_bad = 0, [], 0, False
    if block:
        yield begin, b"\n".join(block)


def _decode_line(line: bytes | None, number: int, file: SourceFile) -> str | ValueError:
    place = f"`{file.path}` line {number}"
    return _too_large(place, file) if line is None else _decode(line, place)


def _decode(data: bytes, place: str, *, count_lines: bool = False) -> str | ValueError:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        newlines = data.count(b"\n", 0, error.start)
        line = f" line {newlines + 1}" if count_lines else ""
        return UserError(
            f"{place}{line} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}. Convert the file to UTF-8"
        )
    # English in UTF-16 is UTF-8, too: every other character is NUL.
    if "\0" in text:
        return UserError(f"{place} has NUL bytes: UTF-16 without a mark? Convert the file to UTF-8")
    return text
