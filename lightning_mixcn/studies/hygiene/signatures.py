"""MinHash signatures on the disk, and the pairs of documents that they make candidates of.

A signature has 170 bands of 3 minima (Broder 1997; bands: Leskovec et al., "Mining of Massive Datasets", chapter 3),
each cut to 16 bits (Li and König 2010): 1,020 bytes a document. Two documents that share a Jaccard index s of their
shingles share a band with probability 1 - (1 - s³)^170, which is 0.99 at s = 0.3.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .characters import Hashes

BANDS, ROWS = 170, 3
_SEED = 1
_ITEM = 2 * ROWS
# Documents of one band that are compared with each other: with the first ones, which are kept, and those just before.
_FIRST, _BEFORE = 16, 16
_BATCH_PAIRS = 1 << 20
Pairs = NDArray[np.int64]


def jaccard_of(changed: float, size: int) -> float:
    """Return the Jaccard index of shingles of ``size`` letters where a share of the letters is changed.

    It is Mash's distance solved for the index (Ondov et al. 2016), with the exact (1 - changed)^size for a shingle that
    stays as it is, so that one threshold serves shingles of any size.
    """
    kept = (1 - changed) ** size
    return kept / (2 - kept)


def changed_of(jaccard: float, size: int) -> float:
    """Return the share of letters changed that a Jaccard index says; the inverse of `jaccard_of`."""
    return float(1 - (2 * jaccard / (1 + jaccard)) ** (1 / size))


def signatures(shingles: list[Hashes]) -> NDArray[np.uint16]:
    """Compute signatures ``[BANDS, documents, ROWS]`` of documents that have at least one shingle each."""
    from rensa import RMinHash

    ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), ends, BANDS * ROWS, _SEED)
    minima = np.asarray(matrix.to_rows(), np.uint32).astype(np.uint16)
    return minima.reshape(len(shingles), BANDS, ROWS).swapaxes(0, 1)


class SignatureFile:
    """Signatures of all documents, band by band: ``[BANDS, documents, ROWS]`` uint16.

    Args:
        path: The file; it is made, full of zeros, where it is not there.
        documents: Number of documents.
    """

    def __init__(self, path: Path, documents: int) -> None:
        self._path, self._documents = path, documents
        if not path.exists() or path.stat().st_size != BANDS * documents * _ITEM:
            with path.open("wb") as file:
                file.truncate(BANDS * documents * _ITEM)

    def write(self, start: int, values: NDArray[np.uint16]) -> None:
        """Write signatures ``[BANDS, count, ROWS]`` of the documents from ``start`` on, down to the disk."""
        file = os.open(self._path, os.O_RDWR)
        try:
            for band, rows in enumerate(values):
                os.pwrite(file, np.ascontiguousarray(rows).tobytes(), (band * self._documents + start) * _ITEM)
            os.fsync(file)
        finally:
            os.close(file)

    def band(self, number: int) -> NDArray[np.uint16]:
        """Read one band of all documents ``[documents, ROWS]``."""
        count, offset = self._documents * ROWS, number * self._documents * _ITEM
        return np.fromfile(self._path, np.uint16, count, offset=offset).reshape(-1, ROWS)

    def agreement(self, pairs: Pairs) -> NDArray[np.float64]:
        """Estimate the Jaccard index of pairs ``[P, 2]`` by the share of minima that agree ``[P]``."""
        agreeing = np.zeros(len(pairs), np.int64)
        for number in range(BANDS):
            band = self.band(number)
            agreeing += (band[pairs[:, 0]] == band[pairs[:, 1]]).sum(axis=1)
        return agreeing / (BANDS * ROWS)

    def candidates(self, documents: NDArray[np.int64], groups: NDArray[np.bool_]) -> Iterator[Pairs]:
        """Find pairs that share a band, in batches; a pair may come in several of them.

        Args:
            documents: Documents to compare, ascending.
            groups: For each whether its shingles are those of dense scripts; only pairs of one group are compared.

        Yields:
            Pairs of documents ``[P, 2]``, the earlier one first.
        """
        gathered, size = list[Hashes](), 0
        for number in range(BANDS):
            rows = self.band(number)[documents].astype(np.uint64)
            keys = rows[:, 0] << np.uint64(32) | rows[:, 1] << np.uint64(16) | rows[:, 2]
            gathered.append(_pairs_of(keys | groups.astype(np.uint64) << np.uint64(48)))
            size += len(gathered[-1])
            if size >= _BATCH_PAIRS or number == BANDS - 1:
                both = np.unique(np.concatenate(gathered))
                first, second = both >> np.uint64(32), both & np.uint64(2**32 - 1)
                yield documents[np.stack([first, second], axis=1).astype(np.int64)]
                gathered, size = [], 0


def _pairs_of(keys: Hashes) -> Hashes:
    """Pair places with equal keys, as ``first << 32 | second``."""
    order = np.argsort(keys, kind="stable")
    arranged = keys[order]
    begins = np.flatnonzero(np.append(True, arranged[1:] != arranged[:-1]))
    run_start = np.repeat(begins, np.diff(np.append(begins, len(keys))))
    rank = np.arange(len(keys)) - run_start
    found = [np.zeros(0, np.uint64)]
    for back in range(1, min(_BEFORE, int(rank.max(initial=0))) + 1):
        later = np.flatnonzero(rank >= back)
        found.append(order[later - back].astype(np.uint64) << np.uint64(32) | order[later].astype(np.uint64))
    for ahead in range(min(_FIRST, int(rank.max(initial=0)))):
        later = np.flatnonzero(rank > ahead + _BEFORE)
        earlier = order[run_start[later] + ahead]
        found.append(earlier.astype(np.uint64) << np.uint64(32) | order[later].astype(np.uint64))
    return np.concatenate(found)
