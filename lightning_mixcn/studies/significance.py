"""Is a difference between two models on the same documents, or between two ways to train over seeds, more than chance?

Legend: D documents, F random sign flips.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_mixcn.errors import UserError

_Z_95 = 1.959963984540054
_EXACT_UP_TO = 12  # sign flips of so many differences are all tried
_RANDOM_FLIPS = 20_000
_CHUNK = 2**22  # elements


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), which is not empty where all are alike.

    Args:
        share: Share of the trials, 0 to 1.
        trials: Their number, at least 1.

    >>> [round(end, 3) for end in wilson_interval(0.6, 100)]
    [0.502, 0.691]
    """
    z2 = _Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # The share is inside, whatever the rounding at 0 and 1.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def pairs_to_tell_from_chance(share: float) -> int | None:
    """Return the least number of trials whose `wilson_interval` of this share leaves out one half; None for 0.5.

    >>> pairs_to_tell_from_chance(0.6)
    97
    """
    # Wilson's interval is that of the score test, whose variance is the one under one half.
    return None if share == 0.5 else math.ceil(_Z_95**2 / (4 * (share - 0.5) ** 2))


class PairedTest(NamedTuple):
    """The second model's scores less the first one's.

    Args:
        difference: Mean over documents.
        standard_error: Standard error of the difference, from the documents' differences; NaN for fewer than two.
        p_value: Two-sided, of differences as large as this if the two models were alike.
        method: ``mcnemar``, where all scores are 0 or 1, or ``permutation``.
        documents: D.
    """

    difference: float
    standard_error: float
    p_value: float
    method: str
    documents: int


def paired_test(first_D: ArrayLike, second_D: ArrayLike, seed: int = 0) -> PairedTest:
    """Compare two models document by document.

    Args:
        first_D: Scores ``[D]`` of one model.
        second_D: Scores ``[D]`` of the other, of the same documents in the same order.
        seed: Seed of the random sign flips.

    Returns:
        The exact McNemar test where every score is 0 or 1, else a paired permutation test (sign flips).

    Raises:
        ValueError: no documents, different numbers of them, or scores that are not finite.
    """
    one_D, two_D = np.asarray(first_D, dtype=np.float64), np.asarray(second_D, dtype=np.float64)
    if one_D.shape != two_D.shape or one_D.ndim != 1 or not len(one_D):
        raise UserError(f"expected the scores of the same documents, got shapes {one_D.shape} and {two_D.shape}")
    if not (np.isfinite(one_D).all() and np.isfinite(two_D).all()):
        raise UserError("scores are not finite. Leave those documents out")
    difference_D = two_D - one_D
    binary = bool(np.isin([one_D, two_D], (0.0, 1.0)).all())
    p_value = mcnemar_p(one_D, two_D) if binary else sign_flip_p(difference_D, seed)
    count = len(difference_D)
    error = float(difference_D.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return PairedTest(float(difference_D.mean()), error, p_value, "mcnemar" if binary else "permutation", count)


class Interval(NamedTuple):
    """A mean difference, and the bounds of its confidence interval.

    Args:
        difference: Mean of the differences.
        low: Lower bound.
        high: Upper bound.
    """

    difference: float
    low: float
    high: float

    @property
    def separated(self) -> bool:
        """Tell whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def mean_interval(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the t interval of a mean difference (Student 1908): mean ± t(n − 1) · deviation / √n.

    Args:
        differences: n paired differences, 2 or more, e.g. of two arms under the same seed.
        confidence: Share of such intervals that hold the true mean, where differences are normally distributed.

    Raises:
        ValueError: fewer than 2 differences, or values that are not finite.
    """
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        raise UserError(f"expected 2 or more finite differences, got {list(differences)}")
    mean = statistics.fmean(differences)
    half = t_quantile(confidence, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def t_quantile(confidence: float, degrees: int) -> float:
    """Return t such that a Student variable is in [−t, t] with a probability.

    Args:
        confidence: The probability, above 0 and below 1.
        degrees: Degrees of freedom, 1 or more.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_probability(middle, degrees) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_probability(angle: float, degrees: int) -> float:
    """Return P(|T| ≤ √degrees · tan(angle)), a finite sum: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term = total = (math.cos(angle) if degrees > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def mcnemar_p(first_D: NDArray[np.float64], second_D: NDArray[np.float64]) -> float:
    """Return the two-sided p value of the exact McNemar test (1947; a binomial test of documents that differ).

    Args:
        first_D: 0 or 1 of each document.
        second_D: The same of the other model.
    """
    lost = int(((first_D == 1) & (second_D == 0)).sum())
    won = int(((first_D == 0) & (second_D == 1)).sum())
    differ = lost + won
    # Whole numbers, whose quotient Python rounds right: a binomial coefficient of thousands is no float.
    term, total = 1, 1
    for k in range(min(lost, won)):
        term = term * (differ - k) // (k + 1)
        total += term
    return float(min(1.0, 2 * total / 2**differ))


def sign_flip_p(difference_D: NDArray[np.float64], seed: int = 0) -> float:
    """Return the two-sided p value of a mean difference: as likely with either sign if the models were alike.

    Args:
        difference_D: Difference of each document.
        seed: Seed of the random flips; up to 12 documents that differ, all flips are tried.

    Returns:
        The share of sign flips whose sum is at least as large; with random flips, the flip that was seen counts as one.
    """
    moved_D = difference_D[difference_D != 0]
    if not len(moved_D):
        return 1.0
    # Sums of the same numbers in another order differ by rounding, and count as equal.
    least = abs(moved_D.sum()) * (1 - 1e-9) - 1e-12
    if len(moved_D) <= _EXACT_UP_TO:
        bits_FD = np.arange(2 ** len(moved_D))[:, None] >> np.arange(len(moved_D)) & 1
        return float((np.abs((2 * bits_FD - 1) @ moved_D) >= least).mean())
    generator, reached, done = np.random.default_rng(seed), 0, 0
    while done < _RANDOM_FLIPS:
        flips = min(_RANDOM_FLIPS - done, max(1, _CHUNK // len(moved_D)))
        signs_FD = 2.0 * generator.integers(0, 2, size=(flips, len(moved_D)), dtype=np.int8) - 1
        reached += int((np.abs(signs_FD @ moved_D) >= least).sum())
        done += flips
    return (1 + reached) / (1 + _RANDOM_FLIPS)
