"""Documents of one file: JSON Lines, plain text or parquet, compressed or not; damage is named, never repaired."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lightning_mixcn.text.sources import SourceFile

_CHUNK_BYTES = 1 << 20


def iterate_documents(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Read the documents of a file in their order.

    Args:
        file: The file, its format and where the text is in it.

    Yields:
        Record and text of each document. The record is the line where the document begins, counted from 1, or for
        parquet the row, counted from 0.

    Raises:
        ValueError: The file is damaged, a record is malformed or has no text; the message names file and line or row.
    """
    if file.format == "jsonl":
        yield from _json_lines(file)
    elif file.format == "parquet":
        yield from _parquet_rows(file)
    elif file.document_unit == "file":
        yield 1, _decode(b"".join(_chunks(file.path)), f"`{file.path}`", count_lines=True)
    elif file.document_unit == "line":
        yield from ((number, text) for number, text in _text_lines(file.path) if text.strip())
    else:
        yield from _blocks(file.path)


def _json_lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    for number, line in _lines(file.path):
        place = f"`{file.path}` line {number}"
        text = _decode(line, place)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is not JSON: {error}. Mend the line, or remove it") from error
        yield number, _text_of(record, file.text_key, place)


def _text_of(record: Any, text_key: str, place: str) -> str:
    """Get the text of a JSON record, which must be an object whose `text_key` is a string of valid Unicode."""
    if not isinstance(record, dict):
        raise ValueError(
            f'{place}: expected a JSON object such as {{"{text_key}": "…"}}, got a {type(record).__name__}'
        )
    if text_key not in record:
        keys = ", ".join(repr(key) for key in record) or "none"
        raise ValueError(f"{place} has no key {text_key!r}. Set the source's `text_key` to one of its keys: {keys}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: expected a string under `text_key` {text_key!r}, got {type(text).__name__}. "
            "Mend the line, or remove it"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        raise ValueError(
            f"{place}: the text is not valid Unicode: {error.reason} at {error.start}. Mend the line"
        ) from error
    return text


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines as text, without their line ends."""
    for number, line in _lines(path):
        yield number, _decode(line, f"`{path}` line {number}").removesuffix("\n").removesuffix("\r")


def _blocks(path: Path) -> Iterator[tuple[int, str]]:
    """Runs of lines between blank lines, joined by newlines."""
    begin, block = 0, list[str]()
    for number, text in _text_lines(path):
        if text.strip():
            begin = begin if block else number
            block.append(text)
        elif block:
            yield begin, "\n".join(block)
            block = []
    if block:
        yield begin, "\n".join(block)


def _parquet_rows(file: SourceFile) -> Iterator[tuple[int, str]]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if file.text_key not in names:
                raise ValueError(
                    f"`{file.path}` has no column {file.text_key!r}. Set the source's `text_key` to one of its "
                    f"columns: {', '.join(map(repr, names))}"
                )
            for batch in table.iter_batches(batch_size=1024, columns=[file.text_key]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(
                            f"`{file.path}` row {row}: expected a string in column {file.text_key!r}, "
                            f"got {type(text).__name__}. Mend or remove the row"
                        )
                    yield row, text
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"`{file.path}` is not a readable parquet file (row {row}): {error}. Get it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`{file.path}` near row {row} is not UTF-8: {error}. Convert the file to UTF-8") from error


def _decode(data: bytes, place: str, *, count_lines: bool = False) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        newlines = data.count(b"\n", 0, error.start)
        line = f" line {newlines + 1}" if count_lines else ""
        raise ValueError(
            f"{place}{line} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}. Convert the file to UTF-8"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, counted from 1, and bytes of each line; a line ends with a newline only."""
    number, rest = 0, list[bytes]()
    for chunk in _chunks(path):
        *complete, last = chunk.split(b"\n")
        for line in complete:
            number += 1
            yield number, b"".join([*rest, line, b"\n"])
            rest = []
        rest.append(last)
    if tail := b"".join(rest):
        yield number + 1, tail


def _chunks(path: Path) -> Iterator[bytes]:
    """Decompressed contents by about a megabyte."""
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as raw:
            if suffix == ".zst":
                yield from _zstandard_chunks(raw, path)
                return
            openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            data: IO[bytes] = openers[suffix](raw) if suffix in openers else raw
            while chunk := data.read(_CHUNK_BYTES):
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"`{path}` is damaged or cut off: {error}. Get it again") from error
    except OSError as error:
        if error.errno is not None:
            raise  # the file system's, such as a missing permission
        raise ValueError(f"`{path}` is damaged: {error}. Get it again") from error


def _zstandard_chunks(raw: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """Decompress all frames; zstandard's own reader takes a cut file for a complete one."""
    import zstandard

    factory = zstandard.ZstdDecompressor()
    frame, fresh = factory.decompressobj(), True
    try:
        while data := raw.read(_CHUNK_BYTES // 8):
            while data:
                if frame.eof:
                    frame = factory.decompressobj()
                chunk = frame.decompress(data)
                fresh = False
                data = frame.unused_data if frame.eof else b""
                if chunk:
                    yield chunk
    except zstandard.ZstdError as error:
        raise ValueError(f"`{path}` is damaged: {error}. Get it again") from error
    if not fresh and not frame.eof:
        raise ValueError(f"`{path}` is cut off: its last zstandard frame is not complete. Get it again")
