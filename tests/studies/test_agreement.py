"""Coefficients against the tables of those who made them."""

import numpy as np
import pytest

from lightning_mixcn.studies.preference.scores import cohen_kappa, krippendorff_alpha, observed_agreement

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", C: four observers, twelve units, nominal 0.743.
OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, -1, -1, -1],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, -1, 3],
        [-1, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, -1],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, -1],
    ]
)


def test_krippendorff_s_own_example() -> None:
    assert krippendorff_alpha(OBSERVERS) == pytest.approx(0.743, abs=5e-4)


def test_cohen_by_hand() -> None:
    """Both yes 20, both no 15, yes and no 5, no and yes 10: 0.7 observed, 0.5 by chance."""
    first = [0] * 20 + [0] * 5 + [1] * 10 + [1] * 15
    second = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert observed_agreement([first, second]) == pytest.approx(0.7)


def test_missing_verdicts_are_left_out() -> None:
    first, second = [0, 1, 2, 0, -1, 1], [0, 1, 1, -1, 2, 1]
    kept = [0, 1, 2, 5]
    assert cohen_kappa(first, second) == cohen_kappa(np.array(first)[kept], np.array(second)[kept])
    both = np.array([first, second])
    assert krippendorff_alpha(both) == krippendorff_alpha(both[:, kept])
    assert observed_agreement(both) == pytest.approx(3 / 4)


def test_equal_and_opposite_judges() -> None:
    equal = np.array([[0, 1, 2, 0]] * 3)
    assert krippendorff_alpha(equal) == 1
    assert cohen_kappa(equal[0], equal[1]) == 1
    # Krippendorff's formula for two judges who never agree: 1 - (n - 1) * 4 / 8 with n = 4.
    assert krippendorff_alpha([[0, 1], [1, 0]]) == pytest.approx(1 - 3 * 4 / 8)


def test_without_anything_to_compare() -> None:
    assert krippendorff_alpha([[0, -1], [-1, 1]]) is None
    assert observed_agreement([[0, -1], [-1, 1]]) is None
    assert cohen_kappa([0, -1], [-1, 1]) is None
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert cohen_kappa([1, 1], [1, 1]) is None
