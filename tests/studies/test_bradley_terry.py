"""Elo against numbers computed by hand, and against a fit by someone else's optimiser."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from lightning_mixcn.studies.preference.scores import elo_ratings


def matches(models: int, won: dict[tuple[int, int], float]) -> np.ndarray:
    wins_MM = np.zeros((models, models))
    for pair, times in won.items():
        wins_MM[pair] += times
    return wins_MM


@pytest.mark.parametrize(
    ("wins", "losses", "difference"),
    [
        (10, 1, 400.0),
        (1, 10, -400.0),
        (3, 1, 190.84850188786498),  # 400 lg 3
        (2 + 2 / 2, 2 / 2, 190.84850188786498),  # two wins and two ties
        (5, 5, 0.0),
        (100_000, 1, 2000.0),
    ],
)
def test_two_models(wins: float, losses: float, difference: float) -> None:
    (elo_M,) = elo_ratings(matches(2, {(1, 0): wins, (0, 1): losses})[None])
    assert elo_M[0] == 1000
    assert elo_M[1] == pytest.approx(1000 + difference, abs=1e-6)


def test_three_models_whose_odds_multiply() -> None:
    """Odds of 10 to 1, 10 to 1 and 100 to 1 are those of 400 and 400 apart."""
    won = {(1, 0): 10.0, (0, 1): 1.0, (2, 1): 10.0, (1, 2): 1.0, (2, 0): 100.0, (0, 2): 1.0}
    np.testing.assert_allclose(elo_ratings(matches(3, won)[None])[0], [1000, 1400, 1800], atol=1e-6)


def test_a_model_linked_through_another() -> None:
    won = {(1, 0): 10.0, (0, 1): 1.0, (2, 1): 1.0, (1, 2): 10.0}
    np.testing.assert_allclose(elo_ratings(matches(3, won)[None])[0], [1000, 1400, 1000], atol=1e-6)


@pytest.mark.parametrize(
    "won",
    [
        {(0, 1): 3.0},  # it won all
        {(0, 1): 3.0, (1, 0): 1.0},  # nobody met the third
        {(0, 1): 1.0, (1, 0): 1.0, (0, 2): 5.0},  # the third only lost
    ],
)
def test_without_a_finite_maximum_there_is_no_elo(won: dict[tuple[int, int], float]) -> None:
    known = matches(3, {(a, b): 1.0 for a in range(3) for b in range(3) if a != b})
    elo_RM = elo_ratings(np.stack([matches(3, won), known]))
    assert np.isnan(elo_RM[0]).all()
    np.testing.assert_allclose(elo_RM[1], 1000)


def test_random_matches_against_lbfgs() -> None:
    """The likelihood written out for torch; sizes from one match to thousands, of which Newton's steps arrive too."""
    draw = np.random.default_rng(0)
    wins_RMM = np.stack([draw.poisson(10 ** draw.uniform(-0.5, 3, size=(5, 5))) for _ in range(40)]).astype(float)
    wins_RMM[:, np.arange(5), np.arange(5)] = 0
    elo_RM = elo_ratings(wins_RMM)
    finite = [place for place, elo_M in enumerate(elo_RM) if not math.isnan(elo_M[0])]
    assert len(finite) > 20
    for wins_MM, elo_M in zip(wins_RMM[finite[:8]], elo_RM[finite[:8]], strict=True):
        np.testing.assert_allclose(elo_M, by_lbfgs(torch.tensor(wins_MM)), atol=0.01)


def by_lbfgs(wins_MM: torch.Tensor) -> np.ndarray:
    rating_M = torch.zeros(len(wins_MM), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [rating_M], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for one, other in combinations(range(len(wins_MM)), 2):
            apart = rating_M[one] - rating_M[other]
            total = total - wins_MM[one, other] * torch.nn.functional.logsigmoid(apart)
            total = total - wins_MM[other, one] * torch.nn.functional.logsigmoid(-apart)
        (total / wins_MM.sum()).backward()
        return total

    optimizer.step(loss)
    elo_M: np.ndarray = (1000 + (rating_M - rating_M[0]).detach() * 400 / math.log(10)).numpy()
    return elo_M
