"""Paired tests beside scipy's, and beside counting by hand."""

import itertools
import math

import numpy as np
import pytest

from lightning_mixcn.studies.significance import paired_test, sign_flip_p, wilson_interval

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
