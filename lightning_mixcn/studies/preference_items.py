"""Which two models a judge sees beside each other, on which side, and in which order."""

import hashlib
import math
from itertools import combinations
from typing import NamedTuple


class Item(NamedTuple):
    """A question with two answers.

    Args:
        name: Its name in the sheet, which says nothing of the models.
        question: Which question, from 0.
        left: Which model's answer is on the left, from 0.
        right: Which model's is on the right.
    """

    name: str
    question: int
    left: int
    right: int


def lay_out(models: int, questions: int, *, sheet: str, seed: int, questions_per_pair: int | None = None) -> list[Item]:
    """Lay out the items of a sheet: every pair of models, and each model as often on the left as on the right.

    Orders come from hashes, so that they are the same with every release of Python and numpy.

    Args:
        models: How many there are.
        questions: How many there are.
        sheet: Name of the sheet, the beginning of all items' names.
        seed: Of the order, the sides, and the questions that are drawn.
        questions_per_pair: Draw this many questions for each pair; ``None`` takes all.

    Returns:
        The items in the order of the sheet.
    """
    chosen: list[tuple[int, int, int]] = []
    for pair in combinations(range(models), 2):
        drawn = sorted(range(questions), key=lambda question: _digest(seed, "side", *pair, question))
        for place, question in enumerate(drawn[:questions_per_pair]):
            chosen.append((question, *(pair if place % 2 == 0 else pair[::-1])))
    chosen.sort(key=lambda item: _digest(seed, "order", *item))
    width = 1 + int(math.log10(len(chosen)))
    return [Item(f"{sheet}-{number:0{width}}", *item) for number, item in enumerate(chosen, 1)]


def _digest(*what: int | str) -> bytes:
    return hashlib.sha256(" ".join(map(str, what)).encode()).digest()
