"""Win rates, Elo, agreement and the judges' bias for a side, with intervals.

Verdicts on one question go together: those of several judges, and of several pairs of models. So what counts for an
interval is how many questions there are. Shares have Wilson's interval (Wilson 1927) of as many trials, which is not
empty where all verdicts are alike; it is too wide rather than too narrow where questions have several verdicts or ties.
For Elo the questions are drawn again (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

Legend: Q questions, M models, J judges, I items, R resamples.
"""

import math
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_mixcn.studies.significance import sign_flip_p, wilson_interval

from .matches import (
    LEFT,
    MISSING,
    RIGHT,
    TIE,
    Matches,
)


def observed_agreement(verdicts_JI: ArrayLike) -> float | None:
    """Return the share of pairs of verdicts on the same item that are equal.

    Args:
        verdicts_JI: Whole numbers ``[J, I]``, one a category; negative where a verdict is missing.

    Returns:
        ``None`` if no item has two verdicts.
    """
    counts_IC = _counts(verdicts_JI)
    pairs = (counts_IC.sum(1) * (counts_IC.sum(1) - 1)).sum()
    return float((counts_IC * (counts_IC - 1)).sum() / pairs) if pairs else None


def cohen_kappa(first_I: ArrayLike, second_I: ArrayLike) -> float | None:
    """Return the agreement of two judges (Cohen 1960), over the items that both have judged.

    Args:
        first_I: Whole numbers ``[I]``, one a category; negative where a verdict is missing.
        second_I: The same of the other judge.

    Returns:
        1 for equal verdicts, 0 for chance; ``None`` if there are none, or all are of one category, so that nothing but
        agreement was possible.
    """
    one_I, two_I = np.asarray(first_I), np.asarray(second_I)
    both_I = (one_I >= 0) & (two_I >= 0)
    if not both_I.any():
        return None
    one_I, two_I = one_I[both_I], two_I[both_I]
    by_chance = sum(float((one_I == c).mean() * (two_I == c).mean()) for c in np.unique([one_I, two_I]))
    return None if by_chance == 1 else (float((one_I == two_I).mean()) - by_chance) / (1 - by_chance)


def krippendorff_alpha(verdicts_JI: ArrayLike) -> float | None:
    """Return the agreement of any number of judges, with verdicts missing or not (Krippendorff 2011, nominal data).

    Args:
        verdicts_JI: Whole numbers ``[J, I]``, one a category; negative where a verdict is missing.

    Returns:
        1 for equal verdicts, 0 for chance; ``None`` if no item has two verdicts, or all verdicts are of one category.
    """
    counts_IC = _counts(verdicts_JI)
    counts_IC = counts_IC[counts_IC.sum(1) > 1]
    total_C = counts_IC.sum(0)
    expected = float((total_C * (total_C.sum() - total_C)).sum())
    if not expected:
        return None
    size_I1 = counts_IC.sum(1, keepdims=True)
    differ = float((counts_IC * (size_I1 - counts_IC) / (size_I1 - 1)).sum())
    return 1 - (float(total_C.sum()) - 1) * differ / expected


def _counts(verdicts_JI: ArrayLike) -> NDArray[np.int64]:
    """Count the judges that chose each category, ``[I, C]``."""
    chosen_JI = np.asarray(verdicts_JI)
    categories = range(int(chosen_JI.max(initial=0)) + 1)
    return np.stack([(chosen_JI == category).sum(0) for category in categories], axis=1).astype(np.int64)


ANCHOR_ELO = 1000.0
_ELO_OF_A_NAT = 400 / math.log(10)
_LARGEST_STEP_NATS, _MOST_STEPS, _PRECISE_NATS = 2.0, 1000, 1e-9

Floats = NDArray[np.float64]


def elo_ratings(wins: Floats) -> Floats:
    """Fit ratings: a model that is 400 above another is expected to win ten times for each time it loses.

    Args:
        wins: ``[R, M, M]``, how often the first model beat the second; a tie is half a win for both.

    Returns:
        Elo ``[R, M]``, the first model at 1000; NaN for sets without a finite maximum, e.g. where a model won all.
    """
    wins_RMM = np.asarray(wins, dtype=np.float64)
    ratings_RM = np.full(wins_RMM.shape[:2], math.nan)
    linked_R = _all_linked(wins_RMM > 0)
    if linked_R.any():
        ratings_RM[linked_R] = ANCHOR_ELO + _ELO_OF_A_NAT * _newton(wins_RMM[linked_R])
    return ratings_RM


def _all_linked(beats_RMM: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell whether each model leads to each other along wins, ``[R]``."""
    models = beats_RMM.shape[1]
    leads_RMM = np.asarray(beats_RMM | np.eye(models, dtype=np.bool_))
    for _ in range(models.bit_length()):
        leads_RMM = np.asarray(leads_RMM.astype(np.float64) @ leads_RMM, dtype=np.bool_)
    return np.asarray(leads_RMM.all(axis=(1, 2)))


def _newton(wins_RMM: Floats) -> Floats:
    """Fit ratings in nats ``[R, M]``, the first 0: the likelihood is concave, so Newton's short steps arrive."""
    played_RMM = wins_RMM + wins_RMM.transpose(0, 2, 1)
    rating_RM = np.zeros(wins_RMM.shape[:2])
    for _ in range(_MOST_STEPS):
        expected_RMM = 1 / (1 + np.exp(rating_RM[:, None, :] - rating_RM[:, :, None]))
        gradient_RM = (wins_RMM - played_RMM * expected_RMM).sum(2)
        weight_RMM = played_RMM * expected_RMM * expected_RMM.transpose(0, 2, 1)
        curvature_RMM = -weight_RMM
        diagonal = np.arange(weight_RMM.shape[1])
        curvature_RMM[:, diagonal, diagonal] = weight_RMM.sum(2) - weight_RMM[:, diagonal, diagonal]
        step_RM = np.linalg.solve(curvature_RMM[:, 1:, 1:], gradient_RM[:, 1:, None])[:, :, 0]
        largest_R = np.abs(step_RM).max(axis=1, keepdims=True)
        step_RM *= np.minimum(1, _LARGEST_STEP_NATS / np.maximum(largest_R, _LARGEST_STEP_NATS))
        rating_RM[:, 1:] += step_RM
        if largest_R.max() < _PRECISE_NATS:
            return rating_RM
    raise AssertionError("Newton's method did not arrive")


_RESAMPLES, _TAILS = 2000, (2.5, 97.5)
# Resamples that may be without a finite Elo for an interval to be given.
_MOST_WITHOUT_ELO = 0.01


class Figure(NamedTuple):
    """A figure and its 95 % interval.

    Args:
        value: NaN where there is none.
        low: Lower end; NaN where there is none.
        high: Upper end.
    """

    value: float
    low: float
    high: float


class PairScore(NamedTuple):
    """How a model does against another.

    Args:
        model: The model.
        other: The other one.
        verdicts: Number of verdicts.
        win: Share of them that the model wins.
        tie: Share of ties.
        loss: Share that it loses.
        score: Wins and half the ties.
        p_value: Two-sided, of a score as far from one half if the models were alike; by sign flips over questions.
    """

    model: str
    other: str
    verdicts: int
    win: Figure
    tie: Figure
    loss: Figure
    score: Figure
    p_value: float


class ModelScore(NamedTuple):
    """How a model does against all others.

    Args:
        model: The model.
        verdicts: On its answers.
        score: Wins and half the ties.
        elo: The first model has 1000, without an interval of its own.
    """

    model: str
    verdicts: int
    score: Figure
    elo: Figure


class SideScore(NamedTuple):
    """What a judge prefers regardless of the models, which are as often on either side.

    Args:
        judge: The judge, or ``all``.
        verdicts: Number of the judge's verdicts.
        missing: Items without one.
        tie: Share of ties.
        left: Share of verdicts for the left, ties half: 0.5 is no bias.
    """

    judge: str
    verdicts: int
    missing: int
    tie: float
    left: Figure


class PreferenceScores:
    """All figures of filled-in sheets.

    Args:
        matches: The verdicts.
        seed: Seed of the resampling.

    Attributes:
        matches: The same.
        pairs: Figures of every two models.
        models: Figures of every model.
        sides: Figures of every judge, and of all together last.
    """

    def __init__(self, matches: Matches, seed: int = 0) -> None:
        """Compute them."""
        self.matches = matches
        self._question_I = np.array([item.question for item in matches.items])
        self._wins_QMM, self._ties_QMM = _sums(matches, 1 + int(self._question_I.max()))
        self.pairs = [self._pair(*pair) for pair in combinations(range(len(matches.models)), 2)]
        self.models = self._models(np.random.default_rng(seed))
        self.sides = [self._side(name, slice(j, j + 1)) for j, name in enumerate(matches.judges)]
        self.sides.append(self._side("all", slice(None)))

    def agreement(self) -> dict[str, float | int | None]:
        """Return, of the judges, the items with several verdicts, the share of equal pairs, and coefficients."""
        verdicts_JI = self.matches.verdicts
        return {
            "judges": len(verdicts_JI),
            "items_with_several_verdicts": int(((verdicts_JI != MISSING).sum(axis=0) > 1).sum()),
            "observed_agreement": observed_agreement(verdicts_JI),
            "cohen_kappa": cohen_kappa(*verdicts_JI) if len(verdicts_JI) == 2 else None,
            "krippendorff_alpha": krippendorff_alpha(verdicts_JI),
        }

    def _pair(self, model: int, other: int) -> PairScore:
        win_Q, loss_Q = self._wins_QMM[:, model, other], self._wins_QMM[:, other, model]
        tie_Q = self._ties_QMM[:, model, other]
        count_Q = win_Q + loss_Q + tie_Q
        return PairScore(
            self.matches.models[model],
            self.matches.models[other],
            int(count_Q.sum()),
            win=share(win_Q, count_Q),
            tie=share(tie_Q, count_Q),
            loss=share(loss_Q, count_Q),
            score=share(win_Q + tie_Q / 2, count_Q),
            p_value=sign_flip_p(win_Q - loss_Q) if count_Q.any() else math.nan,
        )

    def _models(self, draw: np.random.Generator) -> list[ModelScore]:
        score_QMM = self._wins_QMM + self._ties_QMM / 2
        won_QM, count_QM = score_QMM.sum(2), (score_QMM + score_QMM.transpose(0, 2, 1)).sum(2)
        elo_M, low_M, high_M = _elo(score_QMM[count_QM.any(axis=1)], draw)
        return [
            ModelScore(
                name,
                int(count_QM[:, model].sum()),
                share(won_QM[:, model], count_QM[:, model]),
                Figure(float(elo_M[model]), float(low_M[model]), float(high_M[model])),
            )
            for model, name in enumerate(self.matches.models)
        ]

    def _side(self, judge: str, chosen: slice) -> SideScore:
        verdicts_JI = self.matches.verdicts[chosen]
        given_JI = verdicts_JI != MISSING
        left_I = (verdicts_JI == LEFT).sum(0) + (verdicts_JI == TIE).sum(0) / 2
        left = share(np.bincount(self._question_I, left_I), np.bincount(self._question_I, given_JI.sum(0)))
        ties = float((verdicts_JI == TIE).sum() / given_JI.sum())
        return SideScore(judge, int(given_JI.sum()), int((~given_JI).sum()), ties, left)


def share(part_Q: NDArray[Any], count_Q: NDArray[Any]) -> Figure:
    """Return a share of all verdicts, with Wilson's interval.

    Args:
        part_Q: Verdicts of some kind on each question, half ones too, ``[Q]``.
        count_Q: All verdicts on it.

    Returns:
        NaN where there is no verdict.
    """
    trials = int((count_Q > 0).sum())
    if not trials:
        return Figure(math.nan, math.nan, math.nan)
    value = float(part_Q.sum() / count_Q.sum())
    return Figure(value, *wilson_interval(value, trials))


def _elo(score_QMM: Floats, draw: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Return Elo ``[M]`` and its intervals; none for the first model, or where too few resamples have an Elo."""
    questions = len(score_QMM)
    times_RQ = draw.multinomial(questions, np.full(questions, 1 / questions), _RESAMPLES)
    drawn_RMM = np.tensordot(times_RQ, score_QMM, axes=1)
    elo_RM = elo_ratings(np.concatenate([score_QMM.sum(0, keepdims=True), drawn_RMM]))
    ends_2M = np.full((2, score_QMM.shape[1]), math.nan)
    has_elo_R = ~np.isnan(elo_RM[1:, 0])
    if not np.isnan(elo_RM[0, 0]) and questions > 1 and has_elo_R.mean() >= 1 - _MOST_WITHOUT_ELO:
        ends_2M[:, 1:] = np.percentile(elo_RM[1:][has_elo_R][:, 1:], _TAILS, axis=0)
    return elo_RM[0], ends_2M[0], ends_2M[1]


def _sums(matches: Matches, questions: int) -> tuple[Floats, Floats]:
    """Count how often each model beat each other on each question, and ties, ``[Q, M, M]``."""
    models = len(matches.models)
    wins_QMM, ties_QMM = np.zeros((2, questions, models, models))
    for place, item in enumerate(matches.items):
        verdicts_J = matches.verdicts[:, place]
        wins_QMM[item.question, item.left, item.right] += (verdicts_J == LEFT).sum()
        wins_QMM[item.question, item.right, item.left] += (verdicts_J == RIGHT).sum()
        ties_QMM[item.question, item.left, item.right] += (verdicts_J == TIE).sum()
        ties_QMM[item.question, item.right, item.left] += (verdicts_J == TIE).sum()
    return wins_QMM, ties_QMM
