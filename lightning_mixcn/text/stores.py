"""The documents of one file, unpacked once into a folder of the cache and mapped from there into memory.

A store is a folder with these files; integers are little-endian, so it can be mapped as it lies:

* `texts.bin`: UTF-8 of all documents, one after the other;
* `offsets.bin`: int64 ``[documents + 1]``, where each document begins in `texts.bin`, and where the last one ends;
* `digests.bin`: uint64 ``[documents]``, a hash of each text;
* `records.bin`: int64 ``[documents]``, line or row of each document in its file;
* `store.json`: what was read how, and counts.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BadRecordPolicy: TypeAlias = Literal["error", "skip"]

VERSION = 1
NAMED_PLACES = 5
_ITEM_BYTES = 8
_BUFFER_BYTES, _BUFFER_DOCUMENTS = 1 << 20, 1 << 14
# Mapped stores a process keeps open, each with up to four file descriptors; usual limits are 1,024 of these.
_MAX_MAPPED_STORES = 100
_HASH = hashlib.blake2b(digest_size=_ITEM_BYTES, person=b"mixcn-split")


@dataclass(frozen=True)
class StoreCounts:
    """What a store holds.

    Args:
        documents: Number of documents.
        num_bytes: UTF-8 bytes of all of them.
        bad_records: Records that were left out.
        bad_places: Errors of the first few of these.
        fingerprint: Hex digest of the texts in their order.
    """

    documents: int
    num_bytes: int
    bad_records: int
    bad_places: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class TextStore:
    """A finished store: its place and counts; its files are mapped when they are first read.

    Args:
        folder: Its folder.
        file: The file, or URL, that was unpacked.
        counts: What it holds.
    """

    folder: str
    file: Path | str
    counts: StoreCounts

    def __len__(self) -> int:
        """Count the documents."""
        return self.counts.documents

    def maps(self) -> MappedStore:
        """Get the mapped files, the same as long as this process has not opened many others since."""
        return _map_store(self.folder, self.counts)


class MappedStore:
    """The files of a store, mapped into memory when they are first used; read only, and shared with forked processes.

    Args:
        folder: The store.
        counts: What it is expected to hold.

    Raises:
        FileNotFoundError: The store is gone, or holds something else by now.
    """

    def __init__(self, folder: str, counts: StoreCounts) -> None:
        """Check that the store is still the expected one."""
        self._folder, self._counts = Path(folder), counts
        found = read_store(self._folder)
        if found is None or found[1] != counts:
            raise FileNotFoundError(
                f"The unpacked texts in `{folder}` are gone, or their source was changed and unpacked again meanwhile. "
                "Start this process again: what is missing is unpacked anew"
            )

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document begins in the texts, and where the last one ends ``[documents + 1]``."""
        return np.frombuffer(_map(self._folder / "offsets.bin"), dtype="<i8")

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Hash of each text ``[documents]``."""
        return np.frombuffer(_map(self._folder / "digests.bin"), dtype="<u8")

    @cached_property
    def records(self) -> NDArray[np.int64]:
        """Line or row of each document in its file ``[documents]``."""
        return np.frombuffer(_map(self._folder / "records.bin"), dtype="<i8")

    @cached_property
    def texts(self) -> mmap.mmap | bytes:
        """UTF-8 of all documents, one after the other."""
        return _map(self._folder / "texts.bin")

    def text(self, index: int) -> str:
        """Get the text of a document."""
        return self.texts[self.offsets[index] : self.offsets[index + 1]].decode()


@lru_cache(maxsize=_MAX_MAPPED_STORES)
def _map_store(folder: str, counts: StoreCounts) -> MappedStore:
    return MappedStore(folder, counts)


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_store(folder: Path) -> tuple[dict[str, Any], StoreCounts] | None:
    """Read what a store was made from and what it holds.

    Args:
        folder: Where it would be.

    Returns:
        Both, or None where there is no store, or one that is damaged, as its files' sizes tell.
    """
    try:
        made_from = json.loads((folder / "store.json").read_bytes())
        counts = made_from.pop("counts")
        counts = StoreCounts(**{**counts, "bad_places": tuple(counts["bad_places"])})
        if made_from["version"] != VERSION:
            return None
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in ("texts", "offsets", "digests", "records")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    items = counts.documents * _ITEM_BYTES
    right = {"texts": counts.num_bytes, "offsets": items + _ITEM_BYTES, "digests": items, "records": items}
    return (made_from, counts) if sizes == right else None


class StoreWriter:
    """Writes a store, a megabyte at a time; it is complete once `finish` has returned.

    Args:
        folder: A new, empty folder.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files."""
        self._folder = folder
        with ExitStack() as opened:
            names = ("texts", "offsets", "digests", "records")
            self._files = {name: opened.enter_context((folder / f"{name}.bin").open("wb")) for name in names}
            self._opened = opened.pop_all()
        self._files["offsets"].write(bytes(_ITEM_BYTES))
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
            record: Its line or row.
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
        """Whether it is time to `flush`."""
        return self._buffered_bytes >= _BUFFER_BYTES or len(self._texts) >= _BUFFER_DOCUMENTS

    def flush(self) -> None:
        """Write what was appended."""
        ends = list(accumulate(map(len, self._texts), initial=self.num_bytes))
        digests = b"".join(self._digests)
        self._fingerprint.update(digests)
        self._files["texts"].write(b"".join(self._texts))
        self._files["offsets"].write(np.asarray(ends[1:], dtype="<i8").tobytes())
        self._files["digests"].write(digests)
        self._files["records"].write(np.asarray(self._records, dtype="<i8").tobytes())
        self.documents += len(self._texts)
        self.num_bytes = ends[-1]
        self._texts, self._records, self._digests, self._buffered_bytes = [], [], [], 0

    def finish(self, made_from: Mapping[str, Any], bad_records: int, bad_places: list[str]) -> StoreCounts:
        """Write the rest and `store.json`.

        Args:
            made_from: What was read how.
            bad_records: Records left out.
            bad_places: Errors of the first of these.

        Returns:
            What the store holds.
        """
        self.flush()
        self._opened.close()
        counts = StoreCounts(
            self.documents, self.num_bytes, bad_records, tuple(bad_places[:NAMED_PLACES]), self._fingerprint.hexdigest()
        )
        content = json.dumps({**made_from, "counts": asdict(counts)}, ensure_ascii=False, indent=1)
        (self._folder / "store.json").write_text(content + "\n", encoding="utf-8")
        return counts
