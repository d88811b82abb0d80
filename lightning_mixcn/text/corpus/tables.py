"""Rows of parquet and Arrow files, read by batches: a table may be larger than the memory."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lightning_mixcn.errors import UserError, one_line
from lightning_mixcn.text.chat.preferences import PREFERENCE_KEYS
from lightning_mixcn.text.chat.records import RECORD_KEYS

from .reading import DamagedFileError, OnRead, open_file
from .sources import SourceFile
from .store import RecordTally

# Few, because a row may have megabytes.
_BATCH_ROWS = 64
_ARROW_MAGIC = b"ARROW1"


class MissingColumnError(UserError):
    """A table has no such column: a wrong setting rather than damage."""


def iterate_rows(
    file: SourceFile, on_bad_record: Callable[[ValueError], None], on_read: OnRead, tally: RecordTally
) -> Iterator[tuple[int, Any]]:
    """Read the texts or the records of a parquet or Arrow file.

    Args:
        file: File, and the column of the text or that it has records.
        on_bad_record: Called with the error of a row without valid text; if it returns, the row is left out.
        on_read: Called with about how many bytes of the file were read since the last call.
        tally: Tally that gets the names of all columns as the records' keys.

    Yields:
        Row, counted from 0, and UTF-8 of its text; or the row as a dictionary.

    Raises:
        DamagedFileError: The file cannot be read any further.
        MissingColumnError: The file has no such column.
    """
    columns = _parquet_columns(file, tally) if file.format == "parquet" else _arrow_columns(file, tally)
    row = 0
    while True:
        try:
            read = next(columns, None)
        except MissingColumnError:
            raise
        except Exception as error:
            if not _is_damage(error):
                raise
            raise DamagedFileError(
                f"`{file.path}` is not a readable {file.format} file (row {row}): {one_line(error)}. Get it again"
            ) from error
        if read is None:
            return
        values, are_texts, num_bytes = read
        on_read(num_bytes)
        for value in values:
            place = f"`{file.path}` row {row}"
            flaw = None if file.records else _flaw(value, are_texts, place, file.text_key)
            if flaw is None:
                yield row, value
            else:
                on_bad_record(flaw)
            row += 1


def _is_damage(error: Exception) -> bool:
    """Tell whether an error is about the file's contents rather than of the file system or a lost connection."""
    import pyarrow

    if isinstance(error, (zipfile.BadZipFile, zlib.error, EOFError)):  # of a table in an archive
        return True
    if isinstance(error, OSError) and not isinstance(error, pyarrow.ArrowException):
        return type(error) is OSError and error.errno is None
    return isinstance(error, (pyarrow.ArrowException, ValueError, OverflowError, MemoryError, KeyError, IndexError))


def _flaw(value: Any, are_texts: bool, place: str, text_key: str) -> ValueError | None:
    if not are_texts or value is None:
        return UserError(
            f"{place}: expected a string in column {text_key!r}, got {type(value).__name__}. Mend or remove the row"
        )
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return UserError(f"{place} is not UTF-8: {error.reason} at {error.start}. Convert the file to UTF-8")
    return None


def _parquet_columns(file: SourceFile, tally: RecordTally) -> Iterator[tuple[list[Any], bool, int]]:
    """Read the column's values by batches, with whether they are texts' bytes, and the bytes of the file read."""
    from pyarrow import parquet

    with open_file(file.path) as raw:
        # Without `pre_buffer` a column is streamed; with it, all of a row group is in memory.
        table = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
        names, num_rows, size = table.schema_arrow.names, table.metadata.num_rows, _size(raw)
        tally.keys, wanted = tuple(names), _wanted_columns(file, names)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            column = batch.to_struct_array() if file.records else batch.column(0)
            yield *_values(column), size * len(column) // max(num_rows, 1)


def _arrow_columns(file: SourceFile, tally: RecordTally) -> Iterator[tuple[list[Any], bool, int]]:
    """Read an Arrow IPC file or stream likewise; every batch is checked, or its offsets could lead outside of it."""
    import pyarrow

    with open_file(file.path) as raw:
        is_stream = raw.read(len(_ARROW_MAGIC)) != _ARROW_MAGIC
        size = _size(raw)
        raw.seek(0)
        # Mapped, a batch as large as the file takes no memory.
        source = pyarrow.memory_map(str(file.path)) if isinstance(file.path, Path) else pyarrow.PythonFile(raw, "r")
        with source:
            names = (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(source).schema.names
            tally.keys, wanted = tuple(names), [names.index(name) for name in _wanted_columns(file, names)]
            source.seek(0)
            options = pyarrow.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
            read = 0
            for share, batch in _batches(source, is_stream, options, size):
                column = batch.to_struct_array() if file.records else batch.column(0)
                column.validate(full=not _is_text(column.type))
                if _is_text(column.type):
                    _as_bytes(column).validate(full=True)
                yield [], True, int(share * size) - read
                read = int(share * size)
                for start in range(0, len(column), _BATCH_ROWS):
                    yield *_values(column.slice(start, _BATCH_ROWS)), 0


def _batches(source: Any, is_stream: bool, options: Any, size: int) -> Iterator[tuple[float, Any]]:
    """Read the record batches of an Arrow file, and which share of the file is read after each."""
    import pyarrow

    if is_stream:
        for batch in pyarrow.ipc.open_stream(source, options=options):
            yield source.tell() / max(size, 1), batch
    else:
        reader = pyarrow.ipc.open_file(source, options=options)
        for index in range(reader.num_record_batches):
            yield (index + 1) / reader.num_record_batches, reader.get_batch(index)


def _values(column: Any) -> tuple[list[Any], bool]:
    """List the values of a column, texts as bytes, which need not be UTF-8; and tell whether they are texts."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_text(column.type):
        return column.to_pylist(), False
    return _as_bytes(column).to_pylist(), True


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view))


def _as_bytes(column: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_string_view(column.type):
        return column.view(pyarrow.binary_view())
    return column.view(pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary())


def _wanted_columns(file: SourceFile, names: list[str]) -> list[str]:
    """Choose the column of the text, or those of records; a table may have others, of any type and size."""
    if file.records:
        read = {*RECORD_KEYS, *PREFERENCE_KEYS, *(name for _, name in file.columns)}
        return [name for name in names if name in read]
    if file.text_key not in names:
        raise MissingColumnError(
            f"`{file.path}` has no column {file.text_key!r}. Set the source's `columns.text` or `text_key` to one of "
            f"its columns: {', '.join(map(repr, names))}"
        )
    return [file.text_key]


def _size(raw: IO[bytes]) -> int:
    position = raw.tell()
    size = raw.seek(0, 2)
    raw.seek(position)
    return size
