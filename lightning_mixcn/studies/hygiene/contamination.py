"""Which questions of a benchmark a document holds: runs of 13 words, and short questions as lines.

Runs of 13 words are what GPT-3's report looked for (Brown et al. 2020, appendix C); a Chinese character is a word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .characters import Hashes, line_hashes, mix, take_apart, token_hashes, windows

GRAM = 13
_FEWEST_LETTERS = 8


class Overlap(NamedTuple):
    """A question that a document holds.

    Args:
        question: Number of the question.
        share: Share of its words in runs that the document has, too; 1 for a line that is the question.
    """

    question: int
    share: float


class QuestionIndex:
    """Runs of 13 words of all questions, and questions of fewer words as a whole.

    Memory: 24 bytes a word of the questions.

    Args:
        questions: Their texts. One of fewer than 13 words counts only as a line, or as the whole document, and one of
            fewer than 8 letters not at all.
    """

    def __init__(self, questions: Sequence[str]) -> None:
        grams, shorts = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        gram_owners, short_owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        self.ignored = 0
        for number, question in enumerate(questions):
            text = take_apart(question)
            runs = _grams(token_hashes(text))
            if len(runs):
                grams.append(runs)
                gram_owners.append(np.full(len(runs), number))
            elif len(text.letters) >= _FEWEST_LETTERS:
                shorts.append(line_hashes(text)[-1:])
                short_owners.append(np.array([number]))
            else:
                self.ignored += 1
        self._by_question = dict(zip((int(owner[0]) for owner in gram_owners[1:]), grams[1:], strict=True))
        self._grams, self._gram_owners = _sorted(grams, gram_owners)
        self._shorts, self._short_owners = _sorted(shorts, short_owners)

    def overlaps(self, tokens: Hashes, lines: Hashes) -> list[Overlap]:
        """Find the questions that a document shares anything with, in their order.

        Args:
            tokens: Hashes of its words, of `token_hashes`.
            lines: Hashes of its lines, of `line_hashes`.
        """
        runs = np.unique(_grams(tokens))
        owners = _owners_of(runs, self._grams, self._gram_owners)
        found = [
            Overlap(int(owner), _covered(np.isin(self._by_question[int(owner)], runs))) for owner in np.unique(owners)
        ]
        shorts = np.unique(_owners_of(np.unique(lines), self._shorts, self._short_owners))
        return sorted([*found, *(Overlap(int(owner), 1.0) for owner in shorts)])


def _grams(tokens: Hashes) -> Hashes:
    return mix(windows(tokens, GRAM))


def _sorted(hashes: list[Hashes], owners: list[NDArray[np.int64]]) -> tuple[Hashes, NDArray[np.int64]]:
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    return together[order], np.concatenate(owners)[order]


def _owners_of(wanted: Hashes, hashes: Hashes, owners: NDArray[np.int64]) -> NDArray[np.int64]:
    left, right = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
    ranges = [owners[begin:end] for begin, end in zip(left, right, strict=True) if begin < end]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def _covered(is_found: NDArray[np.bool_]) -> float:
    """Return the share of words that are in a run that was found; there are 12 more words than runs."""
    return float((np.convolve(is_found, np.ones(GRAM, np.int64)) > 0).mean())
