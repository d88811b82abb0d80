"""Paired tests beside scipy's, and beside counting by hand."""

import itertools
import math

import numpy as np
import pytest

from lightning_mixcn.studies.significance import (
    mean_interval,
    paired_test,
    pairs_to_tell_from_chance,
    sign_flip_p,
    t_quantile,
    wilson_interval,
)

ROWS = [(3, 9, 20), (0, 5, 2), (7, 7, 1), (40, 90, 0), (1400, 1650, 3000), (0, 0, 5)]


def scores(lost: int, won: int, same: int) -> tuple[list[float], list[float]]:
    return [1.0] * lost + [0.0] * won + [1.0] * same, [0.0] * lost + [1.0] * won + [1.0] * same


@pytest.mark.parametrize(("lost", "won", "same"), ROWS)
def test_zero_one_scores_are_a_binomial_test(lost: int, won: int, same: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra eval")
    found = paired_test(*scores(lost, won, same))
    expected = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert found.method == "mcnemar"
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert found.difference == pytest.approx((won - lost) / (won + lost + same))


def test_zero_one_scores_by_hand() -> None:
    # 1 lost, 5 won: 2 · (C(6, 0) + C(6, 1)) / 2⁶
    assert paired_test(*scores(1, 5, 10)).p_value == pytest.approx(14 / 64)


def test_few_documents_try_every_flip() -> None:
    moved = np.array([0.3, -0.1, 0.25, 0.4, 0.0])
    sums = [abs(float(np.dot(signs, moved))) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([total >= abs(moved.sum()) - 1e-9 for total in sums])
    found = paired_test(np.zeros(5), moved)
    assert found.method == "permutation"
    assert found.p_value == pytest.approx(expected)
    assert found.standard_error == pytest.approx(moved.std(ddof=1) / math.sqrt(5))


def test_many_documents_beside_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra eval")
    generator = np.random.default_rng(3)
    one, two = generator.normal(size=80), generator.normal(0.2, size=80)
    expected = stats.permutation_test(
        (two - one,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(5)
    ).pvalue
    # Each has a Monte Carlo error of sqrt(p (1 - p) / 20,000), at most 0.0036.
    assert paired_test(one, two).p_value == pytest.approx(expected, abs=0.015)


def test_p_values_of_alike_models_are_uniform() -> None:
    generator = np.random.default_rng(0)
    values = [sign_flip_p(generator.normal(size=10)) for _ in range(300)]
    assert np.mean(np.array(values) < 0.1) == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(("one", "two"), [([], []), ([1.0], [1.0, 0.0]), ([math.nan], [1.0])])
def test_bad_scores_are_refused(one: list[float], two: list[float]) -> None:
    with pytest.raises(ValueError, match="scores"):
        paired_test(one, two)


@pytest.mark.parametrize(
    ("part", "trials", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]
)
def test_wilson_s_interval(part: int, trials: int, low: float, high: float) -> None:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    assert wilson_interval(part / trials, trials) == pytest.approx((low, high), abs=5e-5)


# The 95 % and 99 % columns of the table in Abramowitz and Stegun (26.10), two-sided.
TABLE = [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (5, 2.571, 4.032),
         (9, 2.262, 3.250), (10, 2.228, 3.169), (30, 2.042, 2.750), (120, 1.980, 2.617)]  # fmt: skip


@pytest.mark.parametrize(("degrees", "of_95", "of_99"), TABLE)
def test_quantiles_of_t_are_those_of_the_table(degrees: int, of_95: float, of_99: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(of_95, abs=6e-4)
    assert t_quantile(0.99, degrees) == pytest.approx(of_99, abs=6e-4)


def test_quantiles_of_t_beside_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra eval")
    for degrees in range(1, 41):
        for confidence in (0.5, 0.95, 0.999):
            assert t_quantile(confidence, degrees) == pytest.approx(
                stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-9
            )


def test_an_interval_by_hand() -> None:
    # Mean 2, deviation 1, three values: 4.3027 / √3 on either side.
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.difference == 2.0
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert not found.separated
    assert mean_interval([1.9, 2.0, 2.1]).separated
    assert mean_interval([-1.9, -2.0, -2.1]).separated


def test_95_of_100_intervals_hold_the_mean() -> None:
    draws = np.random.default_rng(0).normal(1.0, 0.3, size=(2000, 3))
    held = [low <= 1.0 <= high for _, low, high in map(mean_interval, draws.tolist())]
    # Binomial deviation: sqrt(0.05 · 0.95 / 2,000) = 0.005.
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan]])
def test_an_interval_needs_two_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="2 or more finite differences"):
        mean_interval(values)


@pytest.mark.parametrize(("share", "trials"), [(0.0, 7), (0.6, 100), (1.0, 30), (0.31, 100)])
def test_an_interval_is_that_of_scipy(share: float, trials: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra eval")
    expected = stats.binomtest(round(share * trials), trials).proportion_ci(method="wilson")
    assert wilson_interval(share, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.58, 0.8])
def test_so_many_trials_leave_out_one_half(share: float) -> None:
    needed = pairs_to_tell_from_chance(share)
    assert needed is not None
    for trials, tells in ((needed, True), (needed - 1, False)):
        low, high = wilson_interval(share, trials)
        assert (not low < 0.5 < high) == tells
    assert pairs_to_tell_from_chance(0.5) is None
