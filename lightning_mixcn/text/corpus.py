"""All documents of a source in memory, and their division into training, validation and test sets.

In this version the texts of every source are held in memory, in every process, as one compact Arrow string array (the
UTF-8 bytes and eight bytes a document); forked loader workers share it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_mixcn.text.documents import iterate_documents
from lightning_mixcn.text.sources import Source, list_files

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class DocumentOrigin:
    """Where a document was read.

    Args:
        source: Name of its source.
        file: Its file.
        record: Line where it begins, counted from 1; for parquet the row, counted from 0.
    """

    source: str
    file: Path
    record: int


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, in the order of its files.

    Args:
        source: The source.
        texts: `pyarrow.LargeStringArray` ``[documents]``.
        digests: Hash of each text ``[documents]``, uint64.
        files: The files read.
        file_of: Index into `files` of each document ``[documents]``, int32.
        record_of: Line or row of each document in its file ``[documents]``, int64.
    """

    source: Source
    texts: Any
    digests: NDArray[np.uint64]
    files: tuple[Path, ...]
    file_of: NDArray[np.int32]
    record_of: NDArray[np.int64]

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.digests)

    def origin(self, index: int) -> DocumentOrigin:
        """Tell where document `index` was read."""
        return DocumentOrigin(self.source.name, self.files[self.file_of[index]], int(self.record_of[index]))


@dataclass(frozen=True)
class DocumentSet:
    """Some documents of a corpus, in a fixed order.

    Args:
        corpus: All documents of the source.
        indices: int64 positions in the corpus.
    """

    corpus: Corpus
    indices: NDArray[np.int64]

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.corpus.source.name

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.indices)

    def text(self, index: int) -> str:
        """Get the text of document `index` of this set."""
        return str(self.corpus.texts[int(self.indices[index])].as_py())

    def origin(self, index: int) -> DocumentOrigin:
        """Tell where document `index` of this set was read."""
        return self.corpus.origin(int(self.indices[index]))

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the set's texts."""
        ends = np.frombuffer(self.corpus.texts.buffers()[1], dtype=np.int64)[: len(self.corpus) + 1]
        return int(np.diff(ends)[self.indices].sum())

    @property
    def fingerprint(self) -> str:
        """Hex digest of the texts in their order."""
        return hashlib.blake2b(self.corpus.digests[self.indices].tobytes(), digest_size=16).hexdigest()


def read_corpus(source: Source, place: str = "sources[0]") -> Corpus:
    """Read all documents of a source into memory.

    Args:
        source: The source.
        place: How the configuration names it, for errors.

    Returns:
        The documents.

    Raises:
        FileNotFoundError: A path matches no file.
        ValueError: A file is damaged, or the files have no document at all.
    """
    import pyarrow

    files = list_files(source, place)
    data, ends = bytearray(), [0]
    digests, file_of, record_of = list[int](), list[int](), list[int]()
    for position, file in enumerate(files):
        for record, text in iterate_documents(file):
            encoded = text.encode("utf-8")
            data += encoded
            ends.append(len(data))
            digests.append(_digest(encoded))
            file_of.append(position)
            record_of.append(record)
    if not digests:
        raise ValueError(
            f"`{place}.path={source.path!r}`: the {len(files)} files have no document. Give files with text"
        )
    offsets = pyarrow.py_buffer(np.asarray(ends, dtype=np.int64))
    return Corpus(
        source=source,
        texts=pyarrow.LargeStringArray.from_buffers(len(digests), offsets, pyarrow.py_buffer(bytes(data))),
        digests=np.asarray(digests, dtype=np.uint64),
        files=tuple(file.path for file in files),
        file_of=np.asarray(file_of, dtype=np.int32),
        record_of=np.asarray(record_of, dtype=np.int64),
    )


def split_by_hash(corpus: Corpus, fractions: Sequence[float]) -> list[DocumentSet]:
    """Divide documents into held-out sets and the rest by a hash of their text.

    The division depends on the texts alone: not on seeds, files or their order. Equal texts, even of different
    sources, come to the same side, as long as the fractions are the same.

    Args:
        corpus: The documents.
        fractions: Expected share of each held-out set; they sum to less than 1.

    Returns:
        One set a fraction, ordered by hash, and last the rest, in the order of the corpus.
    """
    shares = corpus.digests / 2.0**64
    edges = np.cumsum([0.0, *fractions])
    by_hash = np.argsort(corpus.digests, kind="stable")
    held_out = [
        DocumentSet(corpus, by_hash[(shares[by_hash] >= low) & (shares[by_hash] < high)])
        for low, high in itertools.pairwise(edges)
    ]
    return [*held_out, DocumentSet(corpus, np.flatnonzero(shares >= edges[-1]))]


def all_documents(corpus: Corpus) -> DocumentSet:
    """Take every document, in the order of the corpus."""
    return DocumentSet(corpus, np.arange(len(corpus), dtype=np.int64))


def _digest(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8, person=b"mixcn-split").digest(), "little")
