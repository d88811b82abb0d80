"""Seeds of micro-batches."""

from itertools import product

import torch

from lightning_mixcn.modules.dropout_seed import micro_batch_seed, seed_micro_batch


def test_every_place_has_its_own() -> None:
    places = list(product(range(5), range(50), range(5)))
    assert len({micro_batch_seed(*place) for place in places}) == len(places)


def test_the_same_place_draws_the_same() -> None:
    seed_micro_batch(0, 3, 1)
    first = torch.rand(4)
    torch.rand(7)
    seed_micro_batch(0, 3, 1)
    assert torch.equal(torch.rand(4), first)
