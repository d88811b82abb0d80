"""Which answers stand beside each other."""

from collections import Counter
from itertools import combinations

import pytest

from lightning_mixcn.studies.preference.sheet import lay_out


@pytest.mark.parametrize(("models", "questions"), [(2, 1), (2, 7), (4, 10)])
def test_every_pair_gets_every_question_once(models: int, questions: int) -> None:
    items = lay_out(models, questions, sheet="p1", seed=0)
    found = Counter((item.question, *sorted(item[2:])) for item in items)
    assert found == Counter((q, *pair) for q in range(questions) for pair in combinations(range(models), 2))
    assert len({item.name for item in items}) == len(items)


def test_each_model_is_as_often_on_either_side() -> None:
    items = lay_out(3, 20, sheet="p1", seed=3)
    for pair in combinations(range(3), 2):
        sides = Counter(item[2:] for item in items if set(item[2:]) == set(pair))
        assert sides == {pair: 10, pair[::-1]: 10}


def test_order_and_sides_are_the_seed_s() -> None:
    one, again, other = (lay_out(3, 20, sheet="p1", seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert [item[1:] for item in one] != [item[1:] for item in other]
    assert one[0].name == "p1-01"
    # Neither the pair nor the question can be told from the place.
    assert [item.question for item in one] != sorted(item.question for item in one)
    assert len({tuple(sorted(item[2:])) for item in one[:20]}) == 3


def test_order_is_the_same_everywhere() -> None:
    """Golden: a key that somebody has kept still fits the sheet that the same seed makes."""
    assert [tuple(item) for item in lay_out(2, 3, sheet="p", seed=7)] == [
        ("p-1", 2, 1, 0),
        ("p-2", 1, 0, 1),
        ("p-3", 0, 0, 1),
    ]


def test_questions_are_drawn_for_each_pair() -> None:
    items = lay_out(3, 50, sheet="p", seed=0, questions_per_pair=4)
    assert Counter(tuple(sorted(item[2:])) for item in items) == dict.fromkeys(combinations(range(3), 2), 4)
    drawn = [{item.question for item in items if set(item[2:]) == set(pair)} for pair in combinations(range(3), 2)]
    assert drawn[0] != drawn[1]
    assert len(lay_out(2, 3, sheet="p", seed=0, questions_per_pair=4)) == 3
