"""All documents of a source, unpacked once into a cache folder and read from there.

A process holds some hundred bytes a file and nothing a document: the system caches what is read of the files as long as
there is room, once for all processes.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from lightning_mixcn.errors import UserError

from .listings import LeftOut
from .sources import AnySource, Source, list_files
from .store import (
    BadRecordPolicy,
    StoreCounts,
    TextStore,
    read_store,
)
from .unpack import is_first_rank, unpack_all

if TYPE_CHECKING:
    from numpy.typing import NDArray


import itertools

if TYPE_CHECKING:
    from numpy.typing import NDArray


_BLOCK_DOCUMENTS = 1 << 20
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DocumentOrigin:
    """Where a document was read.

    Args:
        source: Name of its source.
        file: Its file; a string if it is an URL.
        record: Line where it begins, counted from 1; for parquet and Arrow the row, counted from 0.
    """

    source: str
    file: Path | str
    record: int


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, in the order of its files.

    Pickled, it is no more than its arguments: another process maps the same stores when it reads them.

    Args:
        source: The source.
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
        """Get the text of document `index`."""
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
        is_table = read is not None and read[0]["format"] in ("parquet", "arrow")
        return f"`{store.file}` {'row' if is_table else 'line'} {store.open().record(row)}"

    def refuse(self, index: int, reason: str) -> None:
        """Do what `on_bad_record` says with a document that cannot be encoded.

        Args:
            index: The document.
            reason: Why it cannot be.

        Raises:
            ValueError: `on_bad_record` is `error`; the message names file and line or row. Else a warning does.
        """
        told = f"{self.place(index)}: {reason}"
        if self.on_bad_record == "error":
            raise UserError(f"{told}. Mend the record, or leave such records out with `on_bad_record: skip`")
        _logger.warning("%s. It is left out", told)

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


def read_corpus(source: AnySource, place: str = "sources[0]", *, on_bad_record: BadRecordPolicy = "error") -> Corpus:
    """Open the documents of a source; files that are not in the cache folder yet are unpacked there.

    The cache folder is `$MIXCN_CACHE`, or `lightning_mixcn` in `$XDG_CACHE_HOME` or `~/.cache`, and takes the size of
    the texts unpacked. Memory stays small, whatever the size of the files: only one record is held at a time. One line
    of the log says how many files were read, and what was left out and why.

    Args:
        source: The source.
        place: How the configuration names it, for errors.
        on_bad_record: `error` to stop at a record that is malformed, or has no valid text; `skip` to leave it out, and
            the rest of a damaged file too, with a warning.

    Returns:
        The documents.

    Raises:
        FileNotFoundError: A path matches no file.
        OSError: A file cannot be read, or the cache folder cannot be written.
        ValueError: A file is damaged, the files have no document at all, or no record has a key that the source's
            `columns` names.
    """
    if on_bad_record not in get_args(BadRecordPolicy):
        raise UserError(f"`on_bad_record={on_bad_record!r}`: expected one of {', '.join(get_args(BadRecordPolicy))}")
    left_out = LeftOut()
    stores = unpack_all(list_files(source, place, left_out), on_bad_record, source.name)
    corpus = Corpus(source, tuple(stores), on_bad_record)
    _check_columns(corpus, place)
    if not len(corpus):
        places = [place for store in stores for place in store.counts.bad_places]
        bad = f"{corpus.bad_records} bad records, the first: {places[0]}" if places else ""
        blank = f"{corpus.empty_records} records without text" if corpus.empty_records else ""
        but = f" but {' and '.join(filter(None, (blank, bad)))}" if bad or blank else ". Give files with text"
        raise UserError(f"`{place}.path={source.path!r}`: the {len(stores)} files have no document{but}")
    if is_first_rank():
        empty = corpus.empty_records
        without = f", {empty} records without text left out, too" if empty else ""
        left_out.tell(_logger, source.name, len(stores), f"; {len(corpus)} documents{without}", warn=empty > 0)
        _warn_of_bad_records(corpus)
    return corpus


def _check_columns(corpus: Corpus, place: str) -> None:
    """Refuse a column that no record has; that of a text is `text_key`, which every record must have."""
    if isinstance(corpus.source, Source):
        return
    first = next((store for store in corpus.stores if store.counts.keys), None)
    seen = {name for store in corpus.stores for name in store.counts.columns}
    for key, name in (corpus.source.columns or {}).items():
        if first is not None and name not in seen:
            raise UserError(
                f"`{place}.columns.{key}={name!r}`: no record has that key. Give one of those that the first record of "
                f"`{first.file}` has: {', '.join(map(repr, first.counts.keys))}"
            )


def _warn_of_bad_records(corpus: Corpus) -> None:
    for store in corpus.stores:
        counts = store.counts
        if counts.bad_records:
            _logger.warning(
                "`%s`: %d bad records were left out, %d documents are kept.%s The first: %s",
                store.file, counts.bad_records, len(store), _unread(counts), counts.bad_places[0],
            )  # fmt: skip


def _unread(counts: StoreCounts) -> str:
    """Say how much of a damaged file is lost: it is one bad record, however many were in the rest."""
    if not counts.damaged:
        return ""
    told = " The rest of the file was not read"
    if counts.unread_bytes:
        share = 100 * counts.unread_bytes / counts.file_bytes
        return f"{told}: {counts.unread_bytes:,} of {counts.file_bytes:,} bytes, {share:.3g} %."
    return f"{told}: it is cut off." if counts.file_bytes else f"{told}."


_DIGESTS = 2.0**64


@dataclass(frozen=True)
class DocumentSet:
    """Some documents of a corpus, in a fixed order: what is evaluated.

    Args:
        corpus: All documents of the source.
        indices: Positions in the corpus.
    """

    corpus: Corpus
    indices: Sequence[int]

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.corpus.source.name

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.indices)

    def text(self, index: int) -> str:
        """Get the text of document `index` of this set."""
        return self.corpus.text(self.indices[index])

    def origin(self, index: int) -> DocumentOrigin:
        """Tell where document `index` of this set was read."""
        return self.corpus.origin(self.indices[index])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the set's texts."""
        if len(self) == len(self.corpus):
            return self.corpus.total_bytes
        return sum(self.corpus.num_bytes_of(index) for index in self.indices)


@dataclass(frozen=True)
class TrainingDocuments:
    """The documents of a corpus that are not held out; told by their hash, so that no list of them is kept.

    Args:
        corpus: All documents of the source.
        held_out: Documents of the corpus that are not for training.
        share: Hashes below this share of their range are held out.
    """

    corpus: Corpus
    held_out: DocumentSet = field(repr=False)
    share: float

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.corpus.source.name

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.corpus) - len(self.held_out)

    def __contains__(self, index: int) -> bool:
        """Whether document `index` of the corpus is for training."""
        return not self.share or self.corpus.digest(index) / _DIGESTS >= self.share

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the set's texts."""
        return self.corpus.total_bytes - self.held_out.num_bytes

    @property
    def fingerprint(self) -> str:
        """Hex digest of the texts in their order, and of what is held out."""
        return hashlib.blake2b(f"{self.corpus.fingerprint}/{self.share}".encode(), digest_size=16).hexdigest()


def split_by_hash(corpus: Corpus, fractions: Sequence[float]) -> tuple[list[DocumentSet], TrainingDocuments]:
    """Divide documents into held-out sets and the rest by a hash of their text.

    The division depends on the texts alone: not on seeds, files or their order. Equal texts, even of different
    sources, come to the same side, as long as the fractions are the same.

    Args:
        corpus: The documents.
        fractions: Expected share of each held-out set; they sum to less than 1.

    Returns:
        One set a fraction, ordered by hash, and the rest.
    """
    edges = np.cumsum([0.0, *fractions])
    indices, shares = _below(corpus, float(edges[-1]))
    held_out = [
        DocumentSet(corpus, indices[(shares >= low) & (shares < high)].tolist())
        for low, high in itertools.pairwise(edges)
    ]
    return held_out, TrainingDocuments(corpus, DocumentSet(corpus, indices.tolist()), float(edges[-1]))


def _below(corpus: Corpus, share: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Documents with a hash below `share` of its range, ordered by hash, and their shares."""
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64))]
    if share > 0:
        for first, digests in corpus.digest_blocks():
            inside = np.flatnonzero(digests / _DIGESTS < share)
            found.append((inside + first, digests[inside]))
    indices, hashes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(hashes, kind="stable")
    return indices[order], hashes[order] / _DIGESTS


def all_documents(corpus: Corpus) -> DocumentSet:
    """Take every document, in the order of the corpus."""
    return DocumentSet(corpus, range(len(corpus)))
