"""Documents of files, each unpacked once into a folder of the cache and read from there at any place.

A process holds some hundred bytes a file and nothing a document: the system caches what is read of the files as long as
there is room, once for all processes. A store is a folder with these files; integers are little-endian:

* `texts.bin`: UTF-8 of all documents, one after the other;
* `offsets.bin`: int64 ``[documents + 1]``, where each document begins in `texts.bin`, and where the last one ends;
* `digests.bin`: uint64 ``[documents]``, a hash of each text;
* `records.bin`: int64 ``[documents]``, line or row of each document in its file;
* `store.json`: what was read how, counts, and checksums of all these.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import xxhash

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.masking import mask_secrets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sources import AnySource

_logger = logging.getLogger(__name__)
BadRecordPolicy: TypeAlias = Literal["error", "skip"]

# 2: without byte order marks and documents of white space alone; flags of turns are obeyed.
# 3: without marks at the beginning of documents, documents of invisible characters alone, and text with NUL bytes.
# 4: with checksums; carriage returns alone are line ends, too; documents have a largest size.
VERSION = 4
NAMED_PLACES = 5
_PLACE_CHARACTERS = 300
_ITEM_BYTES = 8
_BUFFER_BYTES, _BUFFER_DOCUMENTS = 1 << 20, 1 << 14
_FILES = ("texts", "offsets", "digests", "records")
# Stores a process keeps open, each with four file descriptors; usual limits are 1,024 of these.
_MAX_OPEN_STORES = 100
_HASH = hashlib.blake2b(digest_size=_ITEM_BYTES, person=b"mixcn-split")
_BLOCK_DOCUMENTS = 1 << 20
# Formats whose records are rows, counted from 0; those of the others are lines, counted from 1.
TABLES = ("parquet", "arrow")


@dataclass(frozen=True)
class StoreCounts:
    """Counts of a store, and what its file lost.

    Args:
        documents: Number of documents.
        num_bytes: UTF-8 bytes of all of them.
        bad_records: Records that were left out.
        bad_places: Errors of the first few of these.
        fingerprint: Hex digest of the texts in their order.
        empty_records: Records that were left out because they have nothing but white space to learn from.
        damaged: True if the file is damaged, so that its rest was not read.
        unread_bytes: Bytes of that rest, as the file is stored; 0 if the file ends too early, or its size is not known.
        file_bytes: Bytes of the file, as it is stored; 0 if that is not known.
        columns: Keys or columns named by the source's `columns` that some record has.
        keys: Keys of the first record, where the source has `columns`.
    """

    documents: int
    num_bytes: int
    bad_records: int
    bad_places: tuple[str, ...]
    fingerprint: str
    empty_records: int = 0
    damaged: bool = False
    unread_bytes: int = 0
    file_bytes: int = 0
    columns: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


@dataclass
class RecordTally:
    """Counts and names of all that a file has beside its documents; fields as in `StoreCounts`.

    `keys` are those of the first record, or all columns of a table.
    """

    bad_records: int = 0
    bad_places: list[str] = field(default_factory=list)
    empty_records: int = 0
    damaged: bool = False
    unread_bytes: int = 0
    file_bytes: int = 0
    columns: set[str] = field(default_factory=set)
    keys: tuple[str, ...] = ()

    def add(self, error: ValueError) -> None:
        """Count a bad record, and keep the error of the first few."""
        self.bad_records += 1
        if len(self.bad_places) < NAMED_PLACES:
            self.bad_places.append(mask_secrets(str(error))[:_PLACE_CHARACTERS])


@dataclass(frozen=True)
class TextStore:
    """Finished store: its place and counts; its files are opened when they are first read.

    Args:
        folder: Folder of the store.
        file: File or URL that was unpacked, without its secrets.
        counts: Counts of its contents.
    """

    folder: str
    file: Path | str
    counts: StoreCounts

    def __len__(self) -> int:
        """Count the documents."""
        return self.counts.documents

    def open(self) -> OpenStore:
        """Get the open files, the same as long as this process has not opened many others since."""
        return _open_store(self.folder, self.counts)


class OpenStore:
    """The files of a store, open for reading at any place; forked processes may share them.

    Reads, and no mapped memory: what a process has read of a mapping stays in its memory, with time the whole corpus.

    Args:
        folder: Folder of the store.
        counts: Expected contents.

    Raises:
        FileNotFoundError: The store is gone, or holds something else by now.
    """

    def __init__(self, folder: str, counts: StoreCounts) -> None:
        """Check that the store is still the expected one, and open it."""
        self._files = dict[str, int]()
        found = read_store(Path(folder))
        if found is None or found[1] != counts:
            raise MissingFileError(
                f"The unpacked texts in `{folder}` are gone, or their source was changed and unpacked again meanwhile. "
                "Start this process again: what is missing is unpacked again"
            )
        self._folder = folder
        for name in _FILES:
            self._files[name] = os.open(os.path.join(folder, f"{name}.bin"), os.O_RDONLY)

    def __del__(self) -> None:
        """Close the files."""
        for file in self._files.values():
            os.close(file)

    def span(self, index: int) -> tuple[int, int]:
        """Return where the text of a document begins and ends, in bytes."""
        begin, end = self._integers("offsets", index, 2, "<i8").tolist()
        return begin, end

    def text(self, index: int) -> str:
        """Get the text of a document."""
        begin, end = self.span(index)
        return self._read("texts", begin, end - begin).decode()

    def record(self, index: int) -> int:
        """Get the line or row of a document in its file."""
        return int(self._integers("records", index, 1, "<i8")[0])

    def digests(self, first: int, count: int) -> NDArray[np.uint64]:
        """Get the hashes of `count` texts from `first` on ``[count]``."""
        return self._integers("digests", first, count, "<u8")

    def _integers(self, name: str, first: int, count: int, dtype: str) -> NDArray[Any]:
        return np.frombuffer(self._read(name, first * _ITEM_BYTES, count * _ITEM_BYTES), dtype=dtype)

    def _read(self, name: str, begin: int, size: int) -> bytes:
        parts, missing = [], size
        while missing and (part := os.pread(self._files[name], missing, begin + size - missing)):
            parts.append(part)
            missing -= len(part)
        if missing:
            raise OSError(f"`{self._folder}/{name}.bin` was cut off while it was in use. Start this process again")
        return b"".join(parts)


@lru_cache(maxsize=_MAX_OPEN_STORES)
def _open_store(folder: str, counts: StoreCounts) -> OpenStore:
    return OpenStore(folder, counts)


def read_store(folder: Path) -> tuple[dict[str, Any], StoreCounts] | None:
    """Read what a store was made from and what it holds.

    Args:
        folder: Folder of the store, if there is one.

    Returns:
        Both, or None where there is no store, or one that is damaged, as its files' sizes tell.
    """
    try:
        made_from = json.loads((folder / "store.json").read_bytes())
        del made_from["sums"]
        fields: dict[str, Any] = made_from.pop("counts")
        counts = StoreCounts(**fields | {key: tuple(fields[key]) for key in ("bad_places", "columns", "keys")})
        if made_from["version"] != VERSION:
            return None
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    items = counts.documents * _ITEM_BYTES
    right = {"texts": counts.num_bytes, "offsets": items + _ITEM_BYTES, "digests": items, "records": items}
    return (made_from, counts) if sizes == right else None


def is_intact(folder: Path) -> bool:
    """Tell whether a store, as `read_store` finds it, has the contents that were written; a process reads them once.

    A disk that flips a bit, or a person who edits a file, leaves the sizes as they were.
    """
    states = [(folder / name).stat() for name in ("store.json", *(f"{name}.bin" for name in _FILES))]
    return _has_sums(folder, tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states))


@cache
def _has_sums(folder: Path, states: object) -> bool:
    content = json.loads((folder / "store.json").read_bytes())
    found = {"counts": _sum_of_counts(content["counts"])}
    for name in _FILES:
        with (folder / f"{name}.bin").open("rb") as file:
            found[name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return bool(found == content["sums"])


def _sum_of_counts(counts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(counts, sort_keys=True).encode())


@dataclass(frozen=True)
class DocumentOrigin:
    """Place where a document was read.

    Args:
        source: Name of the document's source.
        file: File of the document; a string if it is an URL.
        record: Line where it begins, counted from 1; for parquet and Arrow the row, counted from 0.
    """

    source: str
    file: Path | str
    record: int


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, in the order of its files.

    Pickled, it is no more than its arguments: another process maps the same stores when it reads them.

    Args:
        source: Source of the documents.
        stores: Unpacked documents of each file.
        on_bad_record: `error` or `skip`, for a document that turns out to be bad when it is encoded.
    """

    source: AnySource
    stores: tuple[TextStore, ...]
    on_bad_record: BadRecordPolicy = "error"

    @cached_property
    def _starts(self) -> list[int]:
        """Index of the first document of each store, and the number of all documents ``[stores + 1]``."""
        return list(accumulate(map(len, self.stores), initial=0))

    def __len__(self) -> int:
        """Count the documents."""
        return self._starts[-1]

    def text(self, index: int) -> str:
        """Return the text of document `index`."""
        store, row = self._locate(index)
        return store.open().text(row)

    def num_bytes_of(self, index: int) -> int:
        """Get the UTF-8 bytes of document `index`."""
        store, row = self._locate(index)
        begin, end = store.open().span(row)
        return end - begin

    def digest(self, index: int) -> int:
        """Get the hash of the text of document `index`, of 64 bits."""
        store, row = self._locate(index)
        return int(store.open().digests(row, 1)[0])

    def digest_blocks(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Read the hashes of all texts.

        Yields:
            Index of the first document of a block, and the hashes ``[block]``, uint64, of at most a million documents.
        """
        for start, store in zip(self._starts, self.stores, strict=False):
            for row in range(0, len(store), _BLOCK_DOCUMENTS):
                yield start + row, store.open().digests(row, min(_BLOCK_DOCUMENTS, len(store) - row))

    def origin(self, index: int) -> DocumentOrigin:
        """Tell where document `index` was read."""
        store, row = self._locate(index)
        return DocumentOrigin(self.source.name, store.file, store.open().record(row))

    def place(self, index: int) -> str:
        """Name the file and the line or row of document `index`, as errors do."""
        store, row = self._locate(index)
        read = read_store(Path(store.folder))
        unit = "row" if read is not None and read[0]["format"] in TABLES else "line"
        return f"`{store.file}` {unit} {store.open().record(row)}"

    def refuse(self, index: int, reason: str) -> None:
        """Do what `on_bad_record` says with a document that cannot be encoded.

        Args:
            index: Index of the document.
            reason: Reason why it cannot be.

        Raises:
            ValueError: `on_bad_record` is `error`; the message names file and line or row. Else a warning does.
        """
        flaw = f"{self.place(index)}: {reason}"
        if self.on_bad_record == "error":
            raise UserError(f"{flaw}. Mend the record, or leave such records out with `on_bad_record: skip`")
        _logger.warning("%s. It is left out", flaw)

    @property
    def total_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(store.counts.num_bytes for store in self.stores)

    @property
    def bad_records(self) -> int:
        """Records that were left out because they were bad."""
        return sum(store.counts.bad_records for store in self.stores)

    @property
    def empty_records(self) -> int:
        """Records that were left out because they have nothing but white space to learn from."""
        return sum(store.counts.empty_records for store in self.stores)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the texts in their order, file by file."""
        parts = "".join(store.counts.fingerprint for store in self.stores if len(store))
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def _locate(self, index: int) -> tuple[TextStore, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index={index}`: source {self.source.name!r} has {len(self)} documents, counted from 0")
        position = bisect_right(self._starts, index) - 1
        return self.stores[position], int(index) - self._starts[position]


def write_store(
    folder: Path, documents: Iterable[tuple[int, bytes]], made_from: Mapping[str, Any], tally: RecordTally
) -> StoreCounts:
    """Write a store.

    Args:
        folder: New folder.
        documents: Record and UTF-8 of each document.
        made_from: File and settings that the store is made from.
        tally: Counts of all that is left out, complete once the documents have been read.

    Returns:
        Counts of the store.

    Raises:
        OSError: The folder cannot be written; or raised by `documents`.
    """
    with naming_cache(folder):
        folder.mkdir()
        writer = StoreWriter(folder)
    # A full disk shows when a file is closed, too.
    with naming_cache(folder, only_space=True), writer:
        for record, encoded in documents:
            writer.append(record, encoded)
            if writer.is_full:
                with naming_cache(folder):
                    writer.flush()
        with naming_cache(folder):
            return writer.finish(made_from, tally)


@contextmanager
def naming_cache(folder: Path, *, only_space: bool = False) -> Iterator[None]:
    """Say of an error that it is the cache folder's, and what to do."""
    try:
        yield
    except OSError as error:
        named = "MIXCN_CACHE" in str(error)
        if named or (only_space and error.errno not in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise OSError(
            error.errno,
            f"The cache folder `{folder.parent}` of unpacked texts cannot be written: {error.strerror or error}. "
            "Set the environment variable MIXCN_CACHE to a folder that can, with room for all texts unpacked",
        ) from error


class StoreWriter:
    """Writes a store, a megabyte at a time; it is complete once `finish` has returned.

    Args:
        folder: A new, empty folder.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files."""
        self._folder = folder
        with ExitStack() as opened:
            self._files = {name: opened.enter_context((folder / f"{name}.bin").open("wb")) for name in _FILES}
            self._opened = opened.pop_all()
        self._sums = {name: xxhash.xxh3_128() for name in _FILES}
        self._write("offsets", bytes(_ITEM_BYTES))
        self._texts, self._records, self._digests = list[bytes](), list[int](), list[bytes]()
        self._buffered_bytes = self.documents = self.num_bytes = 0
        self._fingerprint = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> StoreWriter:
        """Write inside of a `with`, which closes the files."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; what is not `finish`ed is no store."""
        self._opened.close()

    def append(self, record: int, encoded: bytes) -> None:
        """Append a document.

        Args:
            record: Line or row of the document.
            encoded: UTF-8 of its text.
        """
        digest = _HASH.copy()
        digest.update(encoded)
        self._digests.append(digest.digest())
        self._texts.append(encoded)
        self._records.append(record)
        self._buffered_bytes += len(encoded)

    @property
    def is_full(self) -> bool:
        """Tell whether it is time to `flush`."""
        return self._buffered_bytes >= _BUFFER_BYTES or len(self._texts) >= _BUFFER_DOCUMENTS

    def flush(self) -> None:
        """Write what was appended."""
        ends = list(accumulate(map(len, self._texts), initial=self.num_bytes))
        digests = b"".join(self._digests)
        self._fingerprint.update(digests)
        self._write("texts", b"".join(self._texts))
        self._write("offsets", np.asarray(ends[1:], dtype="<i8").tobytes())
        self._write("digests", digests)
        self._write("records", np.asarray(self._records, dtype="<i8").tobytes())
        self.documents += len(self._texts)
        self.num_bytes = ends[-1]
        self._texts, self._records, self._digests, self._buffered_bytes = [], [], [], 0

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._sums[name].update(data)

    def finish(self, made_from: Mapping[str, Any], tally: RecordTally) -> StoreCounts:
        """Write the rest and `store.json`.

        Args:
            made_from: File and settings that the store was made from.
            tally: Counts of all that was left out.

        Returns:
            Counts of the store.
        """
        self.flush()
        self._opened.close()
        left_out = asdict(tally) | {
            "bad_places": tuple(tally.bad_places),
            "columns": tuple(sorted(tally.columns)),
            "keys": tally.keys if made_from.get("columns") else (),
        }
        counts = StoreCounts(
            documents=self.documents,
            num_bytes=self.num_bytes,
            fingerprint=self._fingerprint.hexdigest(),
            **left_out,
        )
        sums = {"counts": _sum_of_counts(asdict(counts))} | {
            name: sum_.hexdigest() for name, sum_ in self._sums.items()
        }
        content = json.dumps({**made_from, "counts": asdict(counts), "sums": sums}, ensure_ascii=False, indent=1)
        (self._folder / "store.json").write_text(content + "\n", encoding="utf-8")
        return counts
