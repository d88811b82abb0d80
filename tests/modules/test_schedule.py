"""The learning rate against its formula, and against resuming."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_mixcn.modules import WarmupCosine, WarmupStableDecay


def optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def rates_of(schedule: WarmupCosine | WarmupStableDecay, steps: int) -> list[float]:
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


def wsd(*rates: float, **settings: Any) -> WarmupStableDecay:
    return WarmupStableDecay(optimizer(*rates), **settings)


@pytest.mark.parametrize(("shape", "power"), [("sqrt", 0.5), ("linear", 1.0)])
@pytest.mark.parametrize("lengths", [{"warmup": 5, "decay": 10}, {"warmup": 0.1, "decay": 0.2}])
def test_the_rate_rises_stays_and_falls(shape: str, power: float, lengths: dict[str, Any]) -> None:
    used = rates_of(wsd(0.2, decay_shape=shape, decay_to=0.1, total_steps=50, **lengths), 52)
    assert used[:5] == pytest.approx([0.2 * step / 6 for step in range(1, 6)])
    assert used[5:41] == [0.2] * 36  # exactly, or an extended run would not be one planned so
    assert used[41:50] == pytest.approx([0.2 * (0.1 + 0.9 * (1 - (step / 10) ** power)) for step in range(1, 10)])
    assert used[50:] == pytest.approx([0.02] * 2)


def test_each_group_decays_from_its_own_peak() -> None:
    schedule = wsd(0.2, 0.05, warmup=1, decay=4, total_steps=10, decay_shape="linear")
    schedule.go_to(8)
    assert [group["lr"] for group in schedule.optimizer.param_groups] == pytest.approx([0.1, 0.025])


@pytest.mark.parametrize("decay", [0, 0.0])
def test_without_a_decay_the_rate_stays(decay: float) -> None:
    assert rates_of(wsd(0.2, warmup=0, decay=decay, total_steps=5), 5) == [0.2] * 5


def test_the_rates_before_the_decay_do_not_depend_on_the_length() -> None:
    short, long = (rates_of(wsd(0.2, warmup=7, decay=9, total_steps=total), 21) for total in (30, 1000))
    assert short == long


def test_warm_up_and_decay_fit_into_the_run() -> None:
    wsd(0.2, warmup=6, decay=4, total_steps=10)
    with pytest.raises(ValueError, match=r"`warmup=6` and `decay=0\.5` are 11 steps, but the run has 10\. Shorten"):
        wsd(0.2, warmup=6, decay=0.5, total_steps=10)
    wsd(0.2, warmup=6, decay=0.5).set_total_steps(1, is_trial=True)
    with pytest.raises(ValueError, match=r"`trainer.max_steps=-1`: WarmupStableDecay needs the number"):
        wsd(0.2).set_total_steps(-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": -1}, r"`warmup=-1`: expected at least 0 steps"),
        ({"decay": 10.0}, r"`decay=10\.0`: expected less than 1 of the run"),
        ({"decay": "long"}, r"`decay='long'`: expected a whole number or a number"),
        ({"decay_shape": "cosine"}, r"`decay_shape='cosine'`: expected one of sqrt, linear"),
        ({"decay_to": 1.5}, r"`decay_to=1\.5`: expected at most 1"),
    ],
)
def test_lengths_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message + "; see WarmupStableDecay$"):
        wsd(0.2, **settings)


@pytest.mark.parametrize(
    ("before", "here", "done", "reasons"),
    [
        ({"warmup": 5, "decay": 10}, {"warmup": 5, "decay": 10}, 40, None),
        ({"warmup": 5, "decay": 0.2}, {"warmup": 5, "decay": 0.2}, 40, None),
        ({"warmup": 5, "decay": 10}, {"warmup": 5, "decay": 10}, 41, None),  # its first step has the peak
        ({"warmup": 5, "decay": 10}, {"warmup": 5, "decay": 10}, 42, "the decay had begun"),
        ({"warmup": 0.1, "decay": 10}, {"warmup": 0.1, "decay": 10}, 40, "the warm-up was another"),
        ({"warmup": 0.1, "decay": 10}, {"warmup": 5, "decay": 10}, 40, None),
        ({"warmup": 5, "decay": 10}, {"warmup": 9, "decay": 10}, 5, "the warm-up was another"),
        ({"warmup": 0.1, "decay": 10}, {"warmup": 0.1, "decay": 10}, 42, "another .*, the decay had begun"),
    ],
)
def test_a_resumed_run_of_another_length_says_whether_it_was_planned_so(
    before: dict[str, Any], here: dict[str, Any], done: int, reasons: str | None
) -> None:
    first, second = wsd(0.2, total_steps=50, **before), wsd(0.2, total_steps=80, **here)
    first.go_to(done)
    said = second.departures(first.state_dict())
    same = all(first.factor(step) == second.factor(step) for step in range(done))
    assert (said == []) == same == (reasons is None)
    assert re.search(reasons or "", " ".join(said))
