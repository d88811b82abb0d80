"""Win rates, Elo, agreement and the judges' bias for a side, with intervals.

The questions are drawn anew (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), each with all verdicts on
it: those of several judges, or of several pairs of models on the same question, go together.

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

Floats = NDArray[np.float64]
_RESAMPLES, _TAILS = 2000, (2.5, 97.5)
# Resamples that may be without a finite Elo for an interval to be given.
_MOST_WITHOUT_ELO = 0.01


class Figure(NamedTuple):
    """A figure and its 95 % interval.

    Args:
        value: NaN where there is none.
        low: Lower end; NaN where there is none, as with fewer than two questions.
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
        questions = 1 + max(item.question for item in matches.items)
        self._question_I = np.array([item.question for item in matches.items])
        judged = np.unique(self._question_I[(matches.verdicts != MISSING).any(axis=0)])
        self._several = len(judged) > 1
        draws = np.random.default_rng(seed).multinomial(len(judged), np.full(len(judged), 1 / len(judged)), _RESAMPLES)
        # The first row is the questions as they are, the others are drawn.
        self._times_RQ = np.zeros((1 + _RESAMPLES, questions))
        self._times_RQ[0] = 1
        self._times_RQ[1:, judged] = draws
        self._wins_QMM, self._ties_QMM = _sums(matches, questions)
        wins_RMM, ties_RMM = (self._resampled(sums) for sums in (self._wins_QMM, self._ties_QMM))
        self.pairs = [self._pair(*pair, wins_RMM, ties_RMM) for pair in combinations(range(len(matches.models)), 2)]
        self.models = self._models(wins_RMM + ties_RMM / 2)
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

    def _resampled(self, sums_Q: NDArray[Any]) -> Floats:
        resampled: Floats = np.tensordot(self._times_RQ, sums_Q, axes=1)
        return resampled

    def _pair(self, model: int, other: int, wins_RMM: Floats, ties_RMM: Floats) -> PairScore:
        win_R, loss_R, tie_R = wins_RMM[:, model, other], wins_RMM[:, other, model], ties_RMM[:, model, other]
        count_R = win_R + loss_R + tie_R
        balance_Q = self._wins_QMM[:, model, other] - self._wins_QMM[:, other, model]
        return PairScore(
            self.matches.models[model],
            self.matches.models[other],
            int(count_R[0]),
            win=self._share(win_R, count_R),
            tie=self._share(tie_R, count_R),
            loss=self._share(loss_R, count_R),
            score=self._share(win_R + tie_R / 2, count_R),
            p_value=sign_flip_p(balance_Q) if count_R[0] else math.nan,
        )

    def _models(self, score_RMM: Floats) -> list[ModelScore]:
        elo_RM = elo_ratings(score_RMM)
        won_RM, count_RM = score_RMM.sum(2), (score_RMM + score_RMM.transpose(0, 2, 1)).sum(2)
        without = np.isnan(elo_RM[1:, 0]).mean()
        scores = []
        for model, name in enumerate(self.matches.models):
            elo = self._figure(elo_RM[:, model])
            if model == 0 or without > _MOST_WITHOUT_ELO:
                elo = Figure(elo.value, math.nan, math.nan)
            share = self._share(won_RM[:, model], count_RM[:, model])
            scores.append(ModelScore(name, int(count_RM[0, model]), share, elo))
        return scores

    def _side(self, judge: str, chosen: slice) -> SideScore:
        verdicts_JI = self.matches.verdicts[chosen]
        count, missing = int((verdicts_JI != MISSING).sum()), int((verdicts_JI == MISSING).sum())
        weight_I = (verdicts_JI == LEFT).sum(0) + (verdicts_JI == TIE).sum(0) / 2
        questions = self._times_RQ.shape[1]
        left_Q = np.bincount(self._question_I, weights=weight_I, minlength=questions)
        count_Q = np.bincount(self._question_I, weights=(verdicts_JI != MISSING).sum(0), minlength=questions)
        left = self._share(self._resampled(left_Q), self._resampled(count_Q))
        return SideScore(judge, count, missing, float((verdicts_JI == TIE).sum()) / count, left)

    def _share(self, part_R: Floats, count_R: Floats) -> Figure:
        with np.errstate(invalid="ignore"):  # a draw without a verdict on it has no share
            return self._figure(part_R / count_R)

    def _figure(self, values_R: Floats) -> Figure:
        drawn = values_R[1:][~np.isnan(values_R[1:])]
        if not self._several or not len(drawn) or math.isnan(values_R[0]):
            return Figure(float(values_R[0]), math.nan, math.nan)
        return Figure(float(values_R[0]), *map(float, np.percentile(drawn, _TAILS)))


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
