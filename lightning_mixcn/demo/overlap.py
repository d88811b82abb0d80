"""Which documents share a run of tokens with a set of held-out ones."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# About 14 Chinese characters or 100 English ones: long enough that a language's set phrases seldom count.
RUN_TOKENS = 24

# Knuth's multiplicative constant (TAOCP 3, section 6.4) for 64 bits: odd, so no bit of a token id is lost.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def run_hashes(ids: Sequence[int], run_tokens: int = RUN_TOKENS) -> NDArray[np.uint64]:
    """Hash every run of consecutive tokens.

    Equal runs have equal hashes, so no common hash means no common run; unequal runs may, with a chance of 2^-64
    each, have equal hashes, which only ever counts one too many.

    Args:
        ids: Token ids of one document.
        run_tokens: Tokens in a run.

    Returns:
        Hashes ``[max(0, len(ids) - run_tokens + 1)]``.
    """
    tokens = (np.asarray(ids, dtype=np.uint64) + np.uint64(1)) * _MULTIPLIER
    tokens ^= tokens >> np.uint64(29)
    count = max(0, len(tokens) - run_tokens + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(run_tokens if count else 0):
        hashes = hashes * _MULTIPLIER + tokens[offset : offset + count]
    return hashes


class HeldOutRuns:
    """The runs of tokens of the held-out documents.

    Args:
        documents: Token ids of each held-out document.
        run_tokens: Tokens in a run.
    """

    def __init__(self, documents: Iterable[Sequence[int]], run_tokens: int = RUN_TOKENS) -> None:
        self.run_tokens = run_tokens
        hashes = [run_hashes(ids, run_tokens) for ids in documents]
        self._hashes = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *hashes]))

    def shared(self, ids: Sequence[int]) -> int:
        """How many of a document's runs are a held-out document's too."""
        hashes = run_hashes(ids, self.run_tokens)
        if not len(self._hashes):
            return 0
        # The held-out hashes are sorted once; `np.isin` would sort them again for every document.
        places = np.searchsorted(self._hashes, hashes)
        return int((self._hashes.take(places, mode="clip") == hashes).sum())
