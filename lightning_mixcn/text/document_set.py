"""The division of a corpus into training, validation and test documents by a hash of their text."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lightning_mixcn.text.corpus import Corpus, DocumentOrigin

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
