"""Decompressed bytes of a file by pieces, and its lines; damage is told, never taken for the end of the file."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from lightning_mixcn.text.files import open_file

CHUNK_BYTES = 1 << 20
# A frame of repetitions is a thousand times its size: a small piece at a time bounds what comes out.
_ZSTANDARD_BYTES = 1 << 15
_MESSAGE_CHARACTERS = 300

OnRead = Callable[[int], None]


class DamagedFileError(ValueError):
    """A file is damaged or cut off: what was read before is all there is."""


def one_line(error: Exception) -> str:
    """What a library says of an error, for a message of ours."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]


def ignore_progress(num_bytes: int) -> None:
    """Take no notice of the bytes read."""


def read_chunks(path: str | Path, on_read: OnRead = ignore_progress) -> Iterator[bytes]:
    """Read the decompressed contents of a file.

    Args:
        path: Local file or URL; `.gz`, `.zst`, `.bz2` and `.xz` are decompressed.
        on_read: Called with how many bytes of the file, as it is stored, were read since the last call.

    Yields:
        Pieces of about a megabyte.

    Raises:
        DamagedFileError: The archive is damaged or cut off.
        OSError: The file system cannot read the file.
    """
    suffix = Path(path).suffix.lower()
    read = 0
    with open_file(path) as raw:
        try:
            for chunk in _decompress(raw, suffix, path):
                position = raw.tell()
                on_read(position - read)
                read = position
                yield chunk
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DamagedFileError(f"`{path}` is damaged or cut off: {one_line(error)}. Get it again") from error
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:
                raise  # the file system's, such as a missing permission or a lost connection
            raise DamagedFileError(f"`{path}` is damaged: {one_line(error)}. Get it again") from error


def split_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Split bytes at newlines, and nowhere else.

    Args:
        chunks: Pieces of any size.

    Yields:
        Number of each line, counted from 1, and its bytes without the newline.
    """
    number, rest = 0, list[bytes]()
    for chunk in chunks:
        lines = chunk.split(b"\n")
        last = lines.pop()
        if lines and rest:
            lines[0] = b"".join([*rest, lines[0]])
            rest = []
        for line in lines:
            number += 1
            yield number, line
        if last:
            rest.append(last)
    if rest:
        yield number + 1, b"".join(rest)


def _decompress(raw: IO[bytes], suffix: str, path: str | Path) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _zstandard_chunks(raw, path)
        return
    with _open_archive(raw, suffix) as data:
        while chunk := data.read(CHUNK_BYTES):
            yield chunk


def _open_archive(raw: IO[bytes], suffix: str) -> AbstractContextManager[Any]:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw, format=lzma.FORMAT_XZ)
    return nullcontext(raw)


def _zstandard_chunks(raw: IO[bytes], path: str | Path) -> Iterator[bytes]:
    """Decompress all frames; zstandard's own reader takes a cut file for a complete one."""
    import zstandard

    factory = zstandard.ZstdDecompressor()
    frame, fresh = factory.decompressobj(), True
    try:
        while data := raw.read(_ZSTANDARD_BYTES):
            while data:
                if frame.eof:
                    frame = factory.decompressobj()
                chunk = frame.decompress(data)
                fresh = False
                data = frame.unused_data if frame.eof else b""
                if chunk:
                    yield chunk
    except zstandard.ZstdError as error:
        raise DamagedFileError(f"`{path}` is damaged: {one_line(error)}. Get it again") from error
    if not fresh and not frame.eof:
        raise DamagedFileError(f"`{path}` is cut off: its last zstandard frame is not complete. Get it again")
