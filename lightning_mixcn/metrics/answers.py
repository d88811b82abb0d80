"""Figures of answers that a model wrote."""

from collections.abc import Collection, Sequence
from typing import TypedDict

_GRAM_TOKENS = 4


class AnswerFigures(TypedDict):
    """Figures of `answer_figures`.

    Args:
        eos_rate: Share of answers that the model ended itself.
        repetition_rate: Share of the 4-grams of tokens, of all answers together, that were in the same answer before
            (as in Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", seq-rep-4).
        length_tokens: Mean number of tokens, the one that ends an answer not counted.
    """

    eos_rate: float
    repetition_rate: float
    length_tokens: float


def answer_figures(answers: Sequence[Sequence[int]], stop_ids: Collection[int]) -> AnswerFigures:
    """Compute the figures that show if a model knows how to end.

    Args:
        answers: Token ids of each, at least one answer; one that ended has the token that ended it.
        stop_ids: Tokens that end an answer.

    Returns:
        The figures.

    >>> answer_figures([[7, 8, 2], [5, 5, 5, 5, 5, 5]], {2})
    {'eos_rate': 0.5, 'repetition_rate': 0.6666666666666666, 'length_tokens': 4.0}
    """
    ended = repeated = grams = length = 0
    for answer in answers:
        stopped = bool(answer) and answer[-1] in stop_ids
        ids = answer[:-1] if stopped else answer
        found = [tuple(ids[start : start + _GRAM_TOKENS]) for start in range(len(ids) - _GRAM_TOKENS + 1)]
        ended += stopped
        repeated += len(found) - len(set(found))
        grams += len(found)
        length += len(ids)
    return AnswerFigures(
        eos_rate=ended / len(answers), repetition_rate=repeated / max(1, grams), length_tokens=length / len(answers)
    )
