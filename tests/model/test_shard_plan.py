"""Bytes between ranks against a count by hand; `benchmarks/scale.py` compares with what FSDP2 sends."""

from lightning_mixcn.model.memory.plan import Sharing


def test_a_ring_of_four() -> None:
    """Each of four ranks passes on three quarters: of 800 bytes twice in each of two micro-batches, of 80 once."""
    assert Sharing("fsdp2", 4).moved(800, 80, 2) == {"all_gather": 2400, "reduce_scatter": 60}
    kept = Sharing("fsdp2", 4, reshard_after_forward=False)
    assert kept.moved(800, 80, 2) == {"all_gather": 1200, "reduce_scatter": 60}


def test_between_two_copies() -> None:
    moved = Sharing("fsdp2", 2, copies=2).moved(800, 80, 1)
    assert moved == {"all_gather": 800, "reduce_scatter": 40, "all_reduce": 40}


def test_what_is_held() -> None:
    assert [Sharing(kind, 4).base(101) for kind in ("whole", "fsdp1", "fsdp2")] == [101, 101, 26]
    assert [Sharing(kind, 4).trained(101) for kind in ("whole", "fsdp1", "fsdp2")] == [101, 26, 26]


def test_what_is_gathered() -> None:
    assert Sharing("fsdp2", 4).gathered(100, 10, layers=8) == 220
    assert Sharing("fsdp1", 4).gathered(100, 10, layers=8) == 20
    assert Sharing("fsdp2", 4, reshard_after_forward=False).gathered(100, 10, layers=8) == 880
    assert Sharing("fsdp2", 1).gathered(100, 10, layers=8) == 0
