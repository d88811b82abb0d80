"""Rows sorted by expert, with and without the host; dropout masks."""

import pytest
import torch

from lightning_mixcn.model.experts.loop import Dropout
from lightning_mixcn.model.experts.routing import padded_rows, route_rows, route_rows_on_device


def test_few_row_counts() -> None:
    assert [padded_rows(rows) for rows in (0, 1, 2, 3, 5, 17, 31, 32, 33, 500)] == [0, 1, 2, 4, 8, 32, 32, 32, 48, 512]
    assert [padded_rows(rows) for rows in (49, 64, 100, 128, 129)] == [64, 64, 112, 128, 160]
    assert [padded_rows(rows) for rows in (1023, 1025, 1857, 2049, 4000)] == [1024, 1088, 1920, 2176, 4096]


def test_row_counts_are_bounded_and_little_is_padding() -> None:
    padded = [padded_rows(rows) for rows in range(512, 16385)]
    assert padded == sorted(padded)
    assert all(rows <= size <= rows * 17 / 16 for rows, size in enumerate(padded, 512))
    assert len(set(padded)) <= 16 * 5 + 1  # 16 from one power of two to the next


@pytest.mark.parametrize("padded", [True, False])
def test_routing_places_every_choice_once(padded: bool) -> None:
    index = torch.rand(50, 5).topk(2).indices
    routing = route_rows(index, 5, padded)
    for expert, rows in routing.experts():
        token, choice = torch.where(index == expert)
        assert torch.equal(routing.row[token, choice], torch.arange(rows.start, rows.start + len(token)))
        assert torch.equal(routing.token[rows][: len(token)], token)


@pytest.mark.parametrize(("tokens", "experts"), [(50, 5), (1, 9), (3, 40)])
def test_the_device_finds_the_same_places(tokens: int, experts: int) -> None:
    index = torch.rand(tokens, experts).topk(2).indices
    with_host, without = route_rows(index, experts, padded=False), route_rows_on_device(index, experts)
    assert torch.equal(without.token, with_host.token)
    assert torch.equal(without.row, with_host.row)
    assert without.ends.dtype == torch.int32
    assert without.ends.tolist() == with_host.offsets[1:]


def test_masks_depend_on_the_seed_only() -> None:
    like = torch.zeros(1)
    one, again, other = (Dropout(0.5, seed).mask((64, 8), 0, like) for seed in (1, 1, 2))
    assert one is not None
    assert again is not None
    assert other is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert set(one.unique().tolist()) == {0.0, 2.0}
