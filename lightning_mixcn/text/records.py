"""Records of one file, of JSON Lines, of a JSON array, or rows of parquet or Arrow, and conversations made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lightning_mixcn.text.byte_streams import DamagedFileError, OnRead, one_line, read_chunks, split_lines
from lightning_mixcn.text.conversations import EmptyTurnError, dump_conversation, read_training_conversation
from lightning_mixcn.text.tables import iterate_rows

if TYPE_CHECKING:
    from lightning_mixcn.text.sources import SourceFile

# A byte order mark at the beginning of a text is left of the file that it was read from; inside of one it is text.
MARK = "\ufeff"
# Zero-width space, non-joiner, joiner, word joiner and mark: nothing that is seen, but not white space to Python.
_INVISIBLE = f"\u200b\u200c\u200d\u2060{MARK}"
_JSON_SPACE = " \t\r\n"
# Joined files have a mark at the beginning of a line.
LINE_SPACE = _JSON_SPACE + MARK
JSON_DECODER = json.JSONDecoder()


@dataclass
class RecordTally:
    """Counts and names of what a file has beside the records that become documents.

    Args:
        empty: Records without text, or with an answer without any: nothing to learn from, and no fault of the file.
        columns: Keys or columns named by the source's `columns` that some record has.
        keys: Keys of the first record, or all columns of a table.
    """

    empty: int = 0
    columns: set[str] = field(default_factory=set)
    keys: tuple[str, ...] = ()


def is_blank(text: str) -> bool:
    """Tell whether a text is nothing but white space and characters of no width."""
    return all(character.isspace() or character in _INVISIBLE for character in text)


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
    for number, record in _conversation_records(file, on_bad_record, on_read, tally):
        try:
            if not isinstance(record, Mapping):
                raise ValueError(f"expected an object, got a {type(record).__name__}")
            turns = read_training_conversation(_renamed(record, file.columns, tally), form, dict(file.roles))
        except EmptyTurnError:
            tally.empty += 1
        except ValueError as error:
            told = _with_own_columns(str(error), record, file, tally) if isinstance(record, Mapping) else str(error)
            on_bad_record(ValueError(f"`{file.path}` {unit} {number}: {told}"))
        else:
            turns = [replace(turn, content=turn.content.lstrip(MARK)) for turn in turns]
            if any(turn.role != "system" and is_blank(turn.content) for turn in turns):
                tally.empty += 1
            else:
                yield number, dump_conversation(turns)


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
            keys = tally.keys if file.format in ("parquet", "arrow") else record
            return f"{told}. `columns.{key}` names {name!r}, but its keys are {', '.join(map(repr, keys)) or 'none'}"
    return told


def _conversation_records(
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
            if text := line.decode().strip(LINE_SPACE):
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
                raise ValueError(f"expected a comma or the array's end after the record of line {line}")
        if rest := text[place + 1 :].strip(_JSON_SPACE):
            raise ValueError(f"expected nothing after the array, got {rest[:20]!r}")
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
