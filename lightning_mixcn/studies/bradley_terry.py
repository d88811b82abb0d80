"""Elo ratings that do not depend on the order of the matches: the maximum of the Bradley-Terry likelihood.

Bradley and Terry 1952, "Rank analysis of incomplete block designs"; that a finite maximum exists just when every model
is linked to every other by a chain of wins in either direction, is Ford's condition (1957).

Legend: R sets of matches, M models.
"""

import math

import numpy as np
from numpy.typing import NDArray

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
    """Whether each model leads to each other along wins, ``[R]``."""
    models = beats_RMM.shape[1]
    leads_RMM = np.asarray(beats_RMM | np.eye(models, dtype=np.bool_))
    for _ in range(models.bit_length()):
        leads_RMM = np.asarray(leads_RMM.astype(np.float64) @ leads_RMM, dtype=np.bool_)
    return np.asarray(leads_RMM.all(axis=(1, 2)))


def _newton(wins_RMM: Floats) -> Floats:
    """Ratings in nats ``[R, M]``, the first 0: the likelihood is concave, so Newton's steps, kept short, arrive."""
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
