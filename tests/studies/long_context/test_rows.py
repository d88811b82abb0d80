"""Lengths are given up one by one."""

from collections.abc import Sequence

from lightning_mixcn.studies.long_context.rows import ContextTooLongError, as_far_as_memory_goes


def test_the_longest_goes_until_the_rest_fits() -> None:
    tried = []

    def attempt(left: Sequence[int]) -> int:
        tried.append(list(left))
        if left[-1] > 20:
            raise ContextTooLongError(left[-1])
        return sum(left)

    assert as_far_as_memory_goes([10, 20, 30, 40], attempt) == (30, [30, 40])
    assert tried == [[10, 20, 30, 40], [10, 20, 30], [10, 20]]


def test_nothing_may_be_left() -> None:
    def attempt(left: Sequence[int]) -> int:
        raise ContextTooLongError(left[-1])

    assert as_far_as_memory_goes([10, 20], attempt) == (None, [10, 20])
