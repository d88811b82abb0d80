import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.demo.text import HeldOutRuns, run_hashes

# Few different tokens and short runs, so that runs do coincide.
documents = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=5)


def runs_of(ids: list[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]


@given(held_out=documents, trained=documents, length=st.integers(1, 5))
def test_shared_runs_are_those_of_comparing_them(
    held_out: list[list[int]], trained: list[list[int]], length: int
) -> None:
    known = {run for ids in held_out for run in runs_of(ids, length)}
    runs = HeldOutRuns(held_out, length)
    for ids in trained:
        assert runs.shared(ids) == sum(run in known for run in runs_of(ids, length))


def test_a_run_has_the_same_hash_wherever_it_is() -> None:
    ids = list(np.random.default_rng(0).integers(0, 49152, 200))
    assert list(run_hashes(ids[50:90])) == list(run_hashes(ids))[50 : 50 + 17]


def test_no_two_of_many_runs_have_the_same_hash() -> None:
    ids = list(np.random.default_rng(0).integers(0, 49152, 100_000))
    assert len(np.unique(run_hashes(ids))) == 100_000 - 23


def test_a_document_shorter_than_a_run_has_none() -> None:
    assert len(run_hashes(range(23))) == 0
    assert len(run_hashes(range(24))) == 1
    assert len(run_hashes([])) == 0
    assert HeldOutRuns([]).shared(range(100)) == 0
