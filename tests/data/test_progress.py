from collections.abc import Callable

import pytest

from lightning_mixcn.data.progress import Order, RunProgress, require_same_order

ORDER: Order = {"num_streams": 64, "sources": "zh, en", "weight of source zh": 0.9}


def test_rows_are_counted_from_where_counting_begins() -> None:
    progress = RunProgress()
    assert (progress.rows, progress.state_dict()) == (0, {})
    progress.set_order(dict(ORDER))
    batches = 10
    progress.begin(lambda: batches, rows_a_batch=8)
    assert progress.rows == 0
    batches = 13
    assert progress.state_dict() == {"rows": 24, "streams": {}, "order": ORDER}
    progress.begin(lambda: 2 * batches, rows_a_batch=3)
    assert progress.rows == 24
    batches = 14
    assert progress.rows == 30


def test_a_loaded_state_goes_on() -> None:
    progress = RunProgress()
    progress.set_order(dict(ORDER))
    progress.begin(lambda: 7, rows_a_batch=8)
    progress.load_state_dict({"rows": 100, "streams": {}, "order": ORDER})
    assert progress.rows == 100
    progress.begin(iter([5, 6]).__next__, rows_a_batch=8)
    assert progress.rows == 108


def test_streams_are_those_after_what_was_consumed() -> None:
    """Batches that were handed out ahead are not in the state."""
    progress = RunProgress()
    progress.set_order(dict(ORDER))
    consumed = 0
    progress.begin(lambda: consumed, rows_a_batch=2)
    for position in (1, 2, 3):
        progress.hand_out({0: {"position": position}})
    assert progress.streams == {}
    consumed = 2
    assert progress.streams == {0: {"position": 2}}
    progress.begin(lambda: consumed, rows_a_batch=2)  # the third is made again
    progress.hand_out({1: {"position": 1}})
    assert progress.streams == {0: {"position": 2}}
    consumed = 3
    assert progress.streams == {0: {"position": 2}, 1: {"position": 1}}
    assert progress.rows == 6


def test_the_state_has_the_newest_of_all_ranks() -> None:
    """Another rank knows the streams that it read, and of the others what it once loaded."""
    progress = RunProgress()
    progress.set_order(dict(ORDER))
    progress.load_state_dict({"rows": 6, "streams": {0: {"position": 2}, 1: {"position": 4}}, "order": ORDER})
    theirs = {0: {"position": 5}, 1: {"position": 3}, 7: {"position": 1}}
    state = progress.state_dict(lambda mine: [mine, theirs])
    assert state["streams"] == {0: {"position": 5}, 1: {"position": 4}, 7: {"position": 1}}


@pytest.mark.parametrize("order_first", [True, False])
def test_another_order_is_refused_as_soon_as_it_is_known(order_first: bool) -> None:
    progress = RunProgress()
    steps: list[Callable[[], None]] = [
        lambda: progress.set_order(ORDER | {"num_streams": 32}),
        lambda: progress.load_state_dict({"rows": 1, "streams": {}, "order": ORDER}),
    ]
    first, second = steps if order_first else reversed(steps)
    first()
    with pytest.raises(ValueError, match=r"cannot be continued: `num_streams` was 64 and is 32\. Restore"):
        second()


def test_every_difference_is_named() -> None:
    current: Order = {"num_streams": 64, "sources": "zh", "seed": 1}
    message = r"`sources` was 'zh, en' and is 'zh'; `weight of source zh` was 0.9 and is None; `seed` was None and is 1"
    with pytest.raises(ValueError, match=message):
        require_same_order(ORDER, current)


def test_the_old_order_of_rows_is_refused_with_the_reason() -> None:
    current: Order = {"mixing": "by row number", **ORDER}
    with pytest.raises(ValueError, match=r"trained on the sources in blocks.*`model\.init_args\.adapter`"):
        require_same_order(ORDER, current)
