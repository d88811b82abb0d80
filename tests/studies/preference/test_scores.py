"""Known verdicts give known rates, Elo and biases."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch

from lightning_mixcn.studies.preference.matches import (
    LEFT,
    MISSING,
    RIGHT,
    TIE,
    Matches,
)
from lightning_mixcn.studies.preference.scores import (
    PreferenceScores,
    cohen_kappa,
    elo_ratings,
    krippendorff_alpha,
    observed_agreement,
    share,
)
from lightning_mixcn.studies.preference.sheet import Item, lay_out


def judged(models: int, questions: int, verdicts: list[list[int]]) -> PreferenceScores:
    items = [
        Item(f"p-{q}-{a}{b}", q, a, b) for q, a, b in product(range(questions), range(models), range(models)) if a < b
    ]
    names = [f"m{model}" for model in range(models)]
    judges = [f"j{judge}" for judge in range(len(verdicts))]
    return PreferenceScores(Matches(names, judges, items, np.array(verdicts, dtype=np.int8)))


def test_two_models_by_hand() -> None:
    """Ten items: the first wins 6, ties 2, loses 2: 7 of 10, and 400 lg (7 / 3) above."""
    (pair,) = judged(2, 10, [[LEFT] * 6 + [TIE] * 2 + [RIGHT] * 2]).pairs
    assert (pair.verdicts, pair.win.value, pair.tie.value, pair.loss.value) == (10, 0.6, 0.2, 0.2)
    assert pair.score.value == pytest.approx(0.7)
    one, other = judged(2, 10, [[LEFT] * 6 + [TIE] * 2 + [RIGHT] * 2]).models
    assert [one.elo.value, other.elo.value] == pytest.approx([1000, 1000 - 400 * math.log10(7 / 3)])
    assert [one.score.value, other.score.value] == pytest.approx([0.7, 0.3])
    # Sign flips of 6 and -2 among 8 moved questions: P(|sum| >= 4) of 8 coins = 2 * (1 + 8 + 28) / 256.
    assert pair.p_value == pytest.approx(2 * 37 / 256)


def test_a_tie_is_half_a_win_for_both() -> None:
    """Two ties are a win and a loss."""
    ties, halves = judged(2, 4, [[LEFT, LEFT, TIE, TIE]]), judged(2, 4, [[LEFT, LEFT, LEFT, RIGHT]])
    assert ties.models[1].elo.value == pytest.approx(halves.models[1].elo.value, abs=1e-6)
    assert ties.pairs[0].score.value == halves.pairs[0].score.value


def test_the_order_of_verdicts_changes_nothing() -> None:
    verdicts = [LEFT, RIGHT, TIE, LEFT, RIGHT, LEFT] * 5
    first, again = judged(3, 10, [verdicts]), judged(3, 10, [verdicts[15:] + verdicts[:15]])
    assert [m.elo.value for m in first.models] == pytest.approx([m.elo.value for m in again.models], abs=1e-6)


def test_intervals_of_a_share_are_those_of_the_normal_distribution() -> None:
    """400 questions, half won: 0.5 ± 1.96 · 0.025."""
    pair = judged(2, 400, [[LEFT, RIGHT] * 200]).pairs[0]
    assert pair.win.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert pair.win.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)
    elo = judged(2, 400, [[LEFT, RIGHT] * 200]).models[1].elo
    # Its derivative: 400 / ln 10 / (p (1 - p)) = 694.9 Elo for a share of 1.
    assert elo.high == pytest.approx(1000 + 694.9 * 1.96 * 0.025, abs=5)


def test_what_is_not_judged_is_no_trial() -> None:
    assert share(np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0])) == share(np.array([1.0, 0.0]), np.ones(2))


def test_judges_of_one_question_are_not_independent() -> None:
    """Five judges who say the same make an interval no narrower than one."""
    verdicts = [LEFT, RIGHT, LEFT] * 20
    one, five = (judged(2, 60, [verdicts] * judges) for judges in (1, 5))
    assert five.pairs[0].verdicts == 300
    assert five.pairs[0].win == one.pairs[0].win
    assert five.pairs[0].p_value == one.pairs[0].p_value
    assert five.agreement()["krippendorff_alpha"] == 1


def test_sides() -> None:
    """A judge who always says left, though models change sides, has no favourite."""
    items = lay_out(2, 40, sheet="p", seed=0)
    verdicts = np.array([[LEFT] * 40, [LEFT if item.left == 0 else RIGHT for item in items]], dtype=np.int8)
    verdicts[0, :10] = MISSING
    scores = PreferenceScores(Matches(["a", "b"], ["leftist", "judge"], items, verdicts))
    leftist, judge, together = scores.sides
    assert (leftist.verdicts, leftist.missing, leftist.left.value) == (30, 10, 1.0)
    assert leftist.left.low == pytest.approx(30 / (30 + 1.96**2), abs=1e-4)  # Wilson's, of nothing but successes
    assert (judge.verdicts, judge.missing, judge.left.value) == (40, 0, 0.5)
    assert (together.judge, together.verdicts) == ("all", 70)
    assert together.left.value == pytest.approx(50 / 70)
    assert together.left.low > 0.5
    alone = PreferenceScores(Matches(["a", "b"], ["judge"], items, verdicts[1:]))
    assert alone.pairs[0].win.value == 1


def test_where_there_is_nothing_there_is_no_figure() -> None:
    alone = judged(2, 1, [[LEFT]])
    assert all(math.isnan(model.elo.value) for model in alone.models)
    unmet = judged(3, 2, [[LEFT, MISSING, MISSING, RIGHT, MISSING, MISSING]])
    assert [pair.verdicts for pair in unmet.pairs] == [2, 0, 0]
    assert math.isnan(unmet.pairs[1].score.value)
    assert math.isnan(unmet.models[2].score.value)
    assert math.isnan(unmet.models[0].elo.value)
    # One loss in five: many draws have none, and an interval of those that have would be wrong.
    few = judged(2, 5, [[LEFT, LEFT, LEFT, LEFT, RIGHT]]).models[1].elo
    assert few.value == pytest.approx(1000 - 400 * math.log10(4))
    assert math.isnan(few.low)


def test_agreement_of_two_judges() -> None:
    scores = judged(2, 4, [[LEFT, RIGHT, TIE, LEFT], [LEFT, RIGHT, RIGHT, MISSING]])
    found = scores.agreement()
    assert (found["judges"], found["items_with_several_verdicts"]) == (2, 3)
    assert found["observed_agreement"] == pytest.approx(2 / 3)
    # Shares of left, right, tie: (1, 1, 1) / 3 and (1, 2, 0) / 3, so 1/3 by chance.
    assert found["cohen_kappa"] == pytest.approx(0.5)


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
