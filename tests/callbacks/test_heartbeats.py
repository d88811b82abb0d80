"""Who counts as dead."""

from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not say that it exports it

from lightning_mixcn.callbacks.rank_watch import Beat, Heartbeats


@pytest.fixture
def ranks() -> list[Heartbeats]:
    store = HashStore()
    return [Heartbeats(store, 3, interval_seconds=5) for _ in range(3)]


def beat(rank: int, number: int, **changes: Any) -> Beat:
    return Beat(rank, f"node{rank}", 1000 + rank, number=number, **changes)


def test_a_rank_lives_while_its_beat_changes(ranks: list[Heartbeats]) -> None:
    for number in range(10):
        for rank, heartbeats in enumerate(ranks):
            heartbeats.exchange(beat(rank, number))
    assert ranks[0].silent(4) is None
    assert ranks[0].failed() is None


def test_a_silent_rank_is_named(ranks: list[Heartbeats]) -> None:
    for rank in (2, 1, 0):
        ranks[rank].exchange(beat(rank, 1, step=12))
    for number in range(2, 15):
        for rank in (1, 0):
            ranks[rank].exchange(beat(rank, number))
    assert ranks[0].silent(64) == (
        "rank 2 (node2, process 1002) has not been heard of for 65 s, last in optimizer step 12"
    )
    assert ranks[0].silent(65) is None


def test_a_rank_that_never_spoke_is_named(ranks: list[Heartbeats]) -> None:
    for number in range(14):
        ranks[0].exchange(beat(0, number))
    assert ranks[0].silent(60) == "rank 1 was never heard of in 70 s"


def test_a_rank_that_fails_says_why(ranks: list[Heartbeats]) -> None:
    told = "rank 1 (node1, process 1001) stopped in optimizer step 3: OutOfMemoryError: no memory"
    ranks[0].exchange_failure(beat(0, 1))
    assert ranks[0].failed() is None
    ranks[1].exchange_failure(beat(1, 1, step=3, failure="OutOfMemoryError: no memory"))
    ranks[0].exchange_failure(beat(0, 1))
    assert ranks[0].failed() == told
    assert not ranks[1].failure_is_known()  # rank 2 has not heard
    ranks[2].exchange_failure(beat(2, 1, failure="its own, a little later"))
    assert ranks[2].failed() is not None
    assert ranks[1].failure_is_known()
