"""The learning rate against its formula, and against resuming."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_mixcn.modules import WarmupCosine


def optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def rates_of(schedule: WarmupCosine, steps: int) -> list[float]:
    """Learning rate that each optimizer step used."""
    used = []
    for _ in range(steps):
        used.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return used


def test_warm_up_is_linear_and_the_rest_half_a_cosine() -> None:
    used = rates_of(WarmupCosine(optimizer(0.2), 0.1, 0.1, total_steps=50), 50)
    assert used[:5] == pytest.approx([0.2 * step / 6 for step in range(1, 6)])
    assert used[5] == pytest.approx(0.2)
    # Halfway from the peak at step 5 to the end at step 50, a cosine is halfway between 0.2 and 0.02.
    assert (used[27] + used[28]) / 2 == pytest.approx(0.11)
    assert used[40] == pytest.approx(0.2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 35 / 45)) / 2))
    assert all(later < earlier for earlier, later in pairwise(used[5:]))
    assert 0.02 < used[-1] < 0.021


def test_every_group_has_its_own_peak() -> None:
    groups = optimizer(0.2, 0.05)
    WarmupCosine(groups, 0.5, 0.0, total_steps=10)
    assert [group["lr"] for group in groups.param_groups] == pytest.approx([0.2 / 6, 0.05 / 6])


def test_no_warm_up_and_one_step() -> None:
    assert rates_of(WarmupCosine(optimizer(0.2), 0.0, 0.0, total_steps=1), 1) == [0.2]


def test_it_stays_at_the_end() -> None:
    assert rates_of(WarmupCosine(optimizer(0.2), 0.0, 0.5, total_steps=4), 8)[4:] == pytest.approx([0.1] * 4)


def test_the_length_may_come_later() -> None:
    late = WarmupCosine(optimizer(0.2), 0.1, 0.1)
    late.set_total_steps(50)
    assert rates_of(late, 50) == rates_of(WarmupCosine(optimizer(0.2), 0.1, 0.1, total_steps=50), 50)


def test_a_resumed_schedule_goes_on() -> None:
    whole = rates_of(WarmupCosine(optimizer(0.2), 0.1, total_steps=30), 30)
    first = WarmupCosine(optimizer(0.2), 0.1, total_steps=30)
    begun = rates_of(first, 12)
    second = WarmupCosine(optimizer(0.2), 0.1, total_steps=30)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert begun + rates_of(second, 18) == whole


def test_a_resumed_run_may_be_longer() -> None:
    first = WarmupCosine(optimizer(0.2), 0.1, total_steps=30)
    second = WarmupCosine(optimizer(0.2), 0.1, total_steps=60)
    second.load_state_dict(first.state_dict())
    assert second.total_steps == 60


def test_an_unlimited_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`trainer.max_steps=-1`.*Set `trainer.max_steps`"):
        WarmupCosine(optimizer(0.2)).set_total_steps(-1)


def test_stepping_without_a_length_is_refused() -> None:
    schedule = WarmupCosine(optimizer(0.2))
    schedule.optimizer.step()
    with pytest.raises(ValueError, match="`total_steps` of WarmupCosine is not set"):
        schedule.step()


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (1.0, 0.1), (0.1, -0.1), (0.1, 1.1)])
def test_fractions_outside_their_range_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"fraction=.*expected (at|more|less) .*; see WarmupCosine$"):
        WarmupCosine(optimizer(0.2), *fractions)
