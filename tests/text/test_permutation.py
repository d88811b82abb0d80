from collections import Counter

import pytest

from lightning_mixcn.text.rows.streams import Permutation

# Of ten places; a checkpoint of today must mean the same rows for ever.
GOLDEN = [7, 1, 3, 8, 6, 2, 9, 4, 5, 0]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_every_index_once(size: int) -> None:
    order = Permutation(size, "zh/0")
    assert sorted(order[place] for place in range(size)) == list(range(size))


def test_the_order_never_changes() -> None:
    order = Permutation(10, "0/zh/0")
    assert [order[place] for place in range(10)] == GOLDEN


def test_other_keys_other_orders() -> None:
    orders = {tuple(Permutation(50, f"{key}")[place] for place in range(50)) for key in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("size", [5, 12, 37])
def test_each_index_is_as_likely_at_each_place(size: int) -> None:
    """Chi-square of the place that three indices come to, over 4,000 keys; far above chance only if it is skewed."""
    for place in (0, size // 2, size - 1):
        counts = Counter(Permutation(size, f"{key}")[place] for key in range(4000))
        expected = 4000 / size
        statistic = sum((counts[index] - expected) ** 2 / expected for index in range(size))
        assert statistic < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_neighbours_part() -> None:
    order = Permutation(10_000, "zh")
    steps = Counter(order[place + 1] - order[place] for place in range(9_999))
    assert steps.most_common(1)[0][1] < 12


def test_places_far_out_need_no_table() -> None:
    assert 0 <= Permutation(10**12, "zh")[10**12 - 1] < 10**12
