"""Decompressed bytes of a file by pieces, and its lines; damage is an error, never taken for the end of the file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any

from lightning_mixcn.errors import MissingFileError, UserError, one_line

# Names that fsspec drivers have for the size, the time of the last change and the hash of a file's contents.
_IDENTITY_KEYS = (
    "size",
    "mtime",
    "created",
    "last_modified",
    "LastModified",
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "checksum",
    "generation",
    "blob_id",
)
LOCAL = "file://"
_ZIP = "zip://"
# Methods that Python's zipfile reads; newer archivers also write 9 (deflate64) and 99 (encrypted by AES).
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_OPEN_DIRECTORIES = 16


def is_url(path: str | Path) -> bool:
    """Tell whether a path is to be opened by an fsspec driver, such as `s3://bucket/a.jsonl`."""
    return isinstance(path, str) and "://" in path


def file_name(path: str | Path) -> Path:
    """Get the path whose suffixes tell the format: of a chain such as `zip://a.jsonl::s3://b/c.zip` the first one."""
    if not is_url(path):
        return Path(path)
    return Path(next(part for part in str(path).split("::") if "://" in part))


def match_urls(
    pattern: str,
    place: str,
    choose: Callable[[list[str], str], list[str]],
    on_folder: Callable[[str], None] = lambda folder: None,
) -> list[str]:
    """List the files of an URL: itself, the fitting files of a folder, or what a glob matches.

    Args:
        pattern: URL of a file, a folder or a glob.
        place: Name of the source in the configuration, for errors.
        choose: Function that chooses the source's files of a folder, given their paths inside and the folder's URL.
        on_folder: Called with each folder that a glob without `**` matches: it is not looked into.

    Returns:
        At least one URL; those of folders and globs sorted.

    Raises:
        FileNotFoundError: Nothing matches.
        ValueError: The URL has no driver, or the driver cannot list it.
    """
    system, path = _file_system(pattern, f"{place}.path")
    try:
        if system.isfile(path):
            return [pattern]
        if system.isdir(path):
            is_folder, names = True, sorted(map(str, system.find(path)))
        else:
            is_folder, names = False, []
            for name in sorted(map(str, system.glob(path))):
                if system.isfile(name):
                    names.append(name)
                elif "**" not in path and system.isdir(name):
                    on_folder(name)
    except Exception as error:  # each driver has exceptions of its own
        raise UserError(
            f"`{place}.path={pattern!r}` cannot be listed: {type(error).__name__}: {error}. "
            "Check the address, the network and the credentials of its driver"
        ) from error
    if is_folder:
        inside = {name.removeprefix(path.rstrip("/") + "/"): name for name in names}
        names = [inside[relative] for relative in choose(list(inside), pattern.rstrip("/"))]
    if not names:
        raise MissingFileError(
            f"`{place}.path={pattern!r}` matches no file with a known suffix, or cannot be reached. "
            "Give the URL of a file, a folder or a glob"
        )
    # A driver's paths lack the protocol, and with some the host: both come before the path in the pattern.
    bare = pattern.rstrip("/")
    prefix = bare.removesuffix(path.rstrip("/"))
    return [prefix + name if prefix != bare else str(system.unstrip_protocol(name)) for name in names]


@contextmanager
def open_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a local file, an URL or a member of a zip archive for reading its raw bytes."""
    if isinstance(path, Path):
        with path.open("rb") as local:
            yield local
    elif (inside := zip_member(path)) is not None:
        with open_file(inside[0]) as raw, zipfile.ZipFile(raw) as opened, opened.open(_member_of(*inside)) as data:
            yield data
    else:
        system, remote = _file_system(path, "path")
        with _naming(path):
            opened = system.open(remote, "rb")
        with opened as data:
            yield data


def identify(path: str | Path) -> dict[str, int | str]:
    """Read what changes when a file does: size, times and hashes.

    Args:
        path: Local file, URL or member of a zip archive.

    Returns:
        `size` in bytes (0 if a server does not say) and `mtime_ns`, or for an URL what its driver knows of size,
        times and hashes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The driver of an URL cannot reach it.
    """
    if isinstance(path, Path):
        stat = path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if (inside := zip_member(path)) is not None:
        member = _member_of(*inside)
        return {**identify(inside[0]), "member_crc": member.CRC, "size": member.file_size}
    system, remote = _file_system(path, "path")
    with _naming(path):
        known = system.info(remote)
    identity: dict[str, int | str] = {key: str(known[key]) for key in _IDENTITY_KEYS if known.get(key) is not None}
    return {**identity, "size": int(known.get("size") or 0)}


def list_zip(archive: str | Path, place: str) -> dict[str, str]:
    """List the files in a zip archive.

    Args:
        archive: Local file or URL.
        place: Name of the source in the configuration, for errors.

    Returns:
        Name of each member, and its path for `open_file` and `identify`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The archive is damaged, or cannot be read.
    """
    try:
        members, _ = _directory(archive)
    except FileNotFoundError as error:
        raise MissingFileError(f"`{place}.path`: `{archive}` is not there. Give an archive that is") from error
    except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, UnicodeError) as error:
        example = f"{str(archive).rpartition('/')[0] or '.'}/*.jsonl"
        raise UserError(
            f"`{place}.path`: `{archive}` is not a readable zip archive: {error}. "
            f"Get it again, or give a glob that leaves it out, e.g. {example}"
        ) from error
    except (OSError, UserError) as error:
        raise UserError(f"`{place}.path`: `{archive}` cannot be read: {one_line(error)}") from error
    outside = archive if isinstance(archive, str) else archive.absolute()
    return {name: f"{_ZIP}{name}::{outside}" for name in members}


def check_members(archive: str | Path, names: Iterable[str], place: str) -> None:
    """Check that members of a zip archive can be read.

    Args:
        archive: Local file or URL.
        names: Names of the members.
        place: Name of the source in the configuration, for errors.

    Raises:
        ValueError: A member is encrypted, there twice, or made by a method that Python does not read.
    """
    members, doubles = _directory(archive)
    for name in names:
        member, where = members[name], f"`{place}.path`: `{name}` in `{archive}`"
        if name in doubles:
            raise UserError(f"{where} is there twice. Unpack the archive, and give the folder")
        if member.flag_bits & 1:
            raise UserError(f"{where} is encrypted. Unpack the archive, and give the folder")
        if member.compress_type not in _ZIP_METHODS:
            raise UserError(
                f"{where} is compressed by method {member.compress_type}. Unpack the archive, and give the folder"
            )
        if "::" in name:
            raise UserError(f"{where} has `::` in its name. Unpack the archive, and give the folder")


def zip_member(path: str) -> tuple[str | Path, str] | None:
    """Split the path of a member into its archive and its name in there, None for another path."""
    if not path.startswith(_ZIP) or "::" not in path:
        return None
    name, _, archive = path.removeprefix(_ZIP).partition("::")
    return (archive if is_url(archive) else Path(archive).expanduser()), name


def _member_of(archive: str | Path, name: str) -> zipfile.ZipInfo:
    member = _directory(archive)[0].get(name)
    if member is None:
        raise MissingFileError(f"`{archive}` has no member `{name}`. Look at its list: `unzip -l`")
    return member


def _directory(archive: str | Path) -> tuple[Mapping[str, zipfile.ZipInfo], frozenset[str]]:
    """Get the members of a zip archive by their names, and names of several; read again once the archive changes."""
    return _read_directory(archive, tuple(identify(archive).items()))


@lru_cache(maxsize=_OPEN_DIRECTORIES)
def _read_directory(archive: str | Path, identity: object) -> tuple[Mapping[str, zipfile.ZipInfo], frozenset[str]]:
    with open_file(archive) as raw, zipfile.ZipFile(raw) as opened:
        members = [member for member in opened.infolist() if not member.is_dir()]
    counts = Counter(member.filename for member in members)
    return (
        {member.filename: member for member in members},
        frozenset(name for name, count in counts.items() if count > 1),
    )


def _file_system(url: str, argument: str) -> tuple[Any, str]:
    """Get the fsspec file system of an URL, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"`{argument}={url!r}` needs a driver that is not installed: {_package_of(url)}. fsspec says: {error}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"`{argument}={url!r}`: {error}. Give a local path, or an URL that fsspec knows, e.g. s3:// or https://"
        ) from error
    except Exception as error:  # some connect at once, or want arguments that an URL does not give
        raise UserError(f"`{argument}={url!r}` cannot be reached: {type(error).__name__}: {one_line(error)}") from error
    return system, path


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Name the URL in the errors of its driver, which has exceptions of its own; what is not there stays that."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"`{url}` is not there, or cannot be reached") from error
    except Exception as error:
        raise UserError(f"`{url}` cannot be read: {type(error).__name__}: {one_line(error)}") from error


def _package_of(url: str) -> str:
    """Say how to install the driver of an URL."""
    from fsspec.registry import known_implementations

    protocol = url.split("://")[0].split("::")[0]
    package = known_implementations.get(protocol, {"class": "fsspec"})["class"].split(".")[0]
    return f"pip install {package}" if package != "fsspec" else f"pip install 'fsspec[{protocol}]'"


CHUNK_BYTES = 1 << 20
# Four bytes of a frame may hold 128 kB of repetitions: of pieces of this size at most 32 MB come out at once.
_ZSTANDARD_BYTES = 1 << 10
_MARK_BYTES = 4

OnRead = Callable[[int], None]


# UTF-32 first: its little-endian mark begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class DamagedFileError(UserError):
    """A file is damaged or cut off: what was read before is all there is.

    Args:
        message: Message of the error.
        unread_share: Share of the file that was not read, between 0 and 1; None if it is all after the bytes that
            `on_read` counted.
    """

    def __init__(self, message: str, unread_share: float | None = None) -> None:
        """Keep both."""
        super().__init__(message, unread_share)
        self.unread_share = unread_share

    def __str__(self) -> str:
        """Get the message."""
        return str(self.args[0])


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


def split_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Split bytes at newlines; at carriage returns where there are these alone, as old Macs wrote them.

    Args:
        chunks: Pieces of any size.
        max_bytes: Bytes of a line that are held in memory at most.

    Yields:
        Number of each line, counted from 1, and its bytes without the newline; None for a line that is longer.
    """
    pieces = iter(chunks)
    end, begin = _line_end(pieces, max_bytes)
    number, rest, size = 0, list[bytes](), 0
    for chunk in chain(begin, pieces):
        *lines, last = chunk.split(end)
        for line in lines:
            number += 1
            size += len(line)
            yield number, None if size > max_bytes else b"".join([*rest, line]) if rest else line
            rest, size = [], 0
        if last:
            size += len(last)
            rest = [*rest, last] if size <= max_bytes else []
    if size:
        yield number + 1, None if size > max_bytes else b"".join(rest)


def _line_end(chunks: Iterator[bytes], max_bytes: int) -> tuple[bytes, list[bytes]]:
    """Tell what ends the lines of a file, by its first megabyte or line, which is returned, too."""
    begin, size, has_return = list[bytes](), 0, False
    for chunk in chunks:
        begin.append(chunk)
        size += len(chunk)
        has_return = has_return or b"\r" in chunk
        if b"\n" in chunk or size > max(max_bytes, CHUNK_BYTES):
            break
        if has_return and size >= CHUNK_BYTES and not chunk.endswith(b"\r"):  # its newline may be in the next one
            break
    return b"\r" if has_return and not any(b"\n" in chunk for chunk in begin) else b"\n", begin


def read_whole(chunks: Iterable[bytes], max_bytes: int) -> bytes | None:
    """Join pieces; None if they are more than `max_bytes`, of which no more is read."""
    parts, size = list[bytes](), 0
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            return None
        parts.append(chunk)
    return b"".join(parts)


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
    out, size = list[bytes](), 0
    try:
        while data := raw.read(_ZSTANDARD_BYTES):
            while data:
                if frame.eof:
                    frame = factory.decompressobj()
                out.append(chunk := frame.decompress(data))
                size += len(chunk)
                fresh = False
                data = frame.unused_data if frame.eof else b""
            if size >= CHUNK_BYTES:
                yield b"".join(out)
                out, size = [], 0
    except zstandard.ZstdError as error:
        yield b"".join(out)  # before the damage
        raise DamagedFileError(f"`{path}` is damaged: {one_line(error)}. Get it again") from error
    if size:
        yield b"".join(out)
    if not fresh and not frame.eof:
        raise DamagedFileError(f"`{path}` is cut off: its last zstandard frame is not complete. Get it again")
