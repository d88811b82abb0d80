"""Decompressed bytes of a file by pieces, and its lines; damage is told, never taken for the end of the file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from lightning_mixcn.text.files import file_name, open_file

CHUNK_BYTES = 1 << 20
# A frame of repetitions is a thousand times its size: a small piece at a time bounds what comes out.
_ZSTANDARD_BYTES = 1 << 15
_MESSAGE_CHARACTERS = 300
_MARK_BYTES = 4

OnRead = Callable[[int], None]


# UTF-32 first: its little-endian mark begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class DamagedFileError(ValueError):
    """A file is damaged or cut off: what was read before is all there is.

    Args:
        message: The message.
        unread_share: Share of the file that was not taken over, between 0 and 1; None if it is what comes after the
            bytes that `on_read` was told.
    """

    def __init__(self, message: str, unread_share: float | None = None) -> None:
        """Keep both."""
        super().__init__(message, unread_share)
        self.unread_share = unread_share

    def __str__(self) -> str:
        """Get the message."""
        return str(self.args[0])


def one_line(error: Exception) -> str:
    """Shorten a library's message for one of ours."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]


def ignore_progress(num_bytes: int) -> None:
    """Take no notice of the bytes read."""


def read_chunks(path: str | Path, on_read: OnRead = ignore_progress) -> Iterator[bytes]:
    """Read the decompressed contents of a text file, without a byte order mark at its beginning.

    Args:
        path: Local file or URL; `.gz`, `.zst`, `.bz2` and `.xz` are decompressed.
        on_read: Called with how many bytes of the file, as it is stored, were read since the last call.

    Yields:
        Pieces of about a megabyte.

    Raises:
        DamagedFileError: The file is damaged or cut off, or its byte order mark is that of UTF-16.
        OSError: The file system cannot read the file.
    """
    suffix = file_name(path).suffix.lower()
    read = 0
    with open_file(path) as raw:
        try:
            for chunk in _without_mark(_decompress(raw, suffix, path), path):
                position = raw.tell()
                on_read(position - read)
                read = position
                yield chunk
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
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


def _without_mark(chunks: Iterator[bytes], path: str | Path) -> Iterator[bytes]:
    """Drop UTF-8's byte order mark, which Windows' editors write; text of another encoding is no damage to guess at."""
    begin = b""
    for chunk in chunks:
        begin += chunk
        if len(begin) >= _MARK_BYTES:
            break
    for mark, encoding in _OTHER_MARKS.items():
        if begin.startswith(mark):
            raise DamagedFileError(
                f"`{path}` is {encoding}, as its byte order mark says. Convert the file to UTF-8", 1.0
            )
    if begin := begin.removeprefix(codecs.BOM_UTF8):
        yield begin
    yield from chunks


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
