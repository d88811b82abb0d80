"""Who starves, from when on, and what is said."""

import torch

from lightning_mixcn.callbacks.expert_load.window import StarvingExperts

FED, HUNGRY = [0.25, 0.25, 0.25, 0.25], [0.4, 0.35, 0.24, 0.01]


def shares(*layers: list[float]) -> torch.Tensor:
    return torch.tensor(layers, dtype=torch.float64)


def test_an_expert_is_told_of_once_until_it_was_fed() -> None:
    starving = StarvingExperts(share=0.1, steps=4)
    told = [starving.update(shares(FED, HUNGRY), steps=2) for _ in range(4)]
    assert told == [[], [(1, 3)], [], []]
    starving.update(shares(FED, FED), steps=2)
    assert [starving.update(shares(FED, HUNGRY), steps=2) for _ in range(2)] == [[], [(1, 3)]]


def test_the_share_is_one_of_uniform_shares() -> None:
    assert not StarvingExperts(share=0.03, steps=1).update(shares(HUNGRY), 1)
    assert StarvingExperts(share=0.05, steps=1).update(shares(HUNGRY), 1) == [(0, 3)]


def test_the_state_goes_on() -> None:
    first, second = StarvingExperts(0.1, 4), StarvingExperts(0.1, 4)
    first.update(shares(HUNGRY), 3)
    second.load_state_dict(first.state_dict())
    assert second.update(shares(HUNGRY), 1) == [(0, 3)]


def test_the_warning_names_layers_and_experts() -> None:
    message = StarvingExperts(0.1, 4).warning([(0, 1), (0, 3), (12, 0)])
    assert "layer 0: 1, 3; layer 12: 0." in message
    assert "for 4 optimizer steps, with less than 0.1 of a uniform share" in message
