"""Win rates, Elo, agreement and the judges' bias for a side, with intervals.

Verdicts on one question go together: those of several judges, and of several pairs of models. So what counts for an
interval is how many questions there are. Shares have Wilson's interval (Wilson 1927) of as many trials, which is not
empty where all verdicts are alike; it is too wide rather than too narrow where questions have several verdicts or ties.
For Elo the questions are drawn anew (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

Legend: Q questions, M models, J judges, I items, R resamples.
"""

import math
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .agreement import cohen_kappa, krippendorff_alpha, observed_agreement
from .bradley_terry import elo_ratings
from .preference_matches import LEFT, MISSING, RIGHT, TIE, Matches
from .significance import sign_flip_p

_RESAMPLES, _TAILS = 2000, (2.5, 97.5)
_Z_95 = 1.959963984540054
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
        verdicts: How many there are.
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
        verdicts: How many the judge gave.
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
        seed: Of the resampling.

    Attributes:
        matches: The same.
        pairs: Of every two models.
        models: Of every model.
        sides: Of every judge, and of all together last.
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
        """Of the judges: how many items have several verdicts, the share of equal pairs, and coefficients."""
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
    """A share of all verdicts, with Wilson's interval.

    Args:
        part_Q: Verdicts of some kind on each question, half ones too, ``[Q]``.
        count_Q: All verdicts on it.

    Returns:
        NaN where there is no verdict.
    """
    trials = int((count_Q > 0).sum())
    if not trials:
        return Figure(math.nan, math.nan, math.nan)
    value, z2 = float(part_Q.sum() / count_Q.sum()), _Z_95**2
    centre = (value + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z_95 / (1 + z2 / trials) * math.sqrt(value * (1 - value) / trials + z2 / (4 * trials**2))
    return Figure(value, max(0.0, centre - half), min(1.0, centre + half))


def _elo(score_QMM: Floats, draw: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Elo ``[M]`` and the ends of its intervals; none for the first model, or where too few resamples have an Elo."""
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
    """How often each model beat each other on each question, and ties, ``[Q, M, M]``."""
    models = len(matches.models)
    wins_QMM, ties_QMM = np.zeros((2, questions, models, models))
    for place, item in enumerate(matches.items):
        verdicts_J = matches.verdicts[:, place]
        wins_QMM[item.question, item.left, item.right] += (verdicts_J == LEFT).sum()
        wins_QMM[item.question, item.right, item.left] += (verdicts_J == RIGHT).sum()
        ties_QMM[item.question, item.left, item.right] += (verdicts_J == TIE).sum()
        ties_QMM[item.question, item.right, item.left] += (verdicts_J == TIE).sum()
    return wins_QMM, ties_QMM
