"""Losses of preference optimisation, from the log-probabilities of pairs of answers.

Legend: P pairs that a batch can have, of which few are there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.metrics import PairScores

PreferenceLoss = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
WITHOUT_REFERENCE: frozenset[PreferenceLoss] = frozenset({"orpo", "simpo"})

DEFAULT_BETA: dict[PreferenceLoss, float] = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
"""Values of the papers' experiments."""


@dataclass(frozen=True)
class LossSettings:
    """Settings of a loss.

    Args:
        loss: Its name.
        beta: Its β.
        label_smoothing: Probability that a label is wrong, of `dpo` and `simpo`.
        margin: γ of `simpo`, in units of the reward.
        undesirable_weight: Weight of bad answers in `kto`; good ones weigh 1.
    """

    loss: PreferenceLoss
    beta: float
    label_smoothing: float = 0.0
    margin: float = 0.0
    undesirable_weight: float = 1.0

    def __call__(self, scores: PairScores, gap: Tensor) -> Tensor:
        """Return the loss of each pair, ``[P]`` float32, whatever of those that are none.

        Args:
            scores: See `score_pairs`.
            gap: For `kto`, mean log-ratio of mismatched answers, a scalar without gradient; see `mismatched_gap`.
        """
        return _LOSSES[self.loss](self, scores, gap)

    def rewards(self, scores: PairScores) -> Tensor:
        """Return the implicit rewards ``[P, 2]``, without gradient: β times what the loss compares of each answer."""
        if self.loss in WITHOUT_REFERENCE:
            return self.beta * scores.mean_log_probability.detach()
        return self.beta * scores.log_ratio.detach()


def _dpo(settings: LossSettings, scores: PairScores, gap: Tensor) -> Tensor:
    """Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290), equation 7; smoothed: Mitchell 2023, note on cDPO."""
    chosen, rejected = scores.log_ratio.unbind(1)
    return _smoothed(settings.beta * (chosen - rejected), settings.label_smoothing)


def _ipo(settings: LossSettings, scores: PairScores, gap: Tensor) -> Tensor:
    """Azar et al. 2023 (https://arxiv.org/abs/2310.12036), equation 17, of means over tokens, as its authors ran it."""
    chosen, rejected = (scores.log_ratio / scores.tokens.clamp_min(1)).unbind(1)
    return (chosen - rejected - 1 / (2 * settings.beta)).square()


def _simpo(settings: LossSettings, scores: PairScores, gap: Tensor) -> Tensor:
    """Meng et al. 2024 (https://arxiv.org/abs/2405.14734), equation 6."""
    chosen, rejected = scores.mean_log_probability.unbind(1)
    return _smoothed(settings.beta * (chosen - rejected) - settings.margin, settings.label_smoothing)


def _orpo(settings: LossSettings, scores: PairScores, gap: Tensor) -> Tensor:
    """Hong et al. 2024 (https://arxiv.org/abs/2403.07691), equations 6 and 7, of the answer alone as there."""
    means = scores.mean_log_probability
    # log(p / (1 − p)), of which a probability near 1 leaves few digits otherwise. A sum of no tokens gives p = 1.
    odds = means - torch.log(-torch.expm1(means.clamp_max(-1e-7)))
    ratio = F.logsigmoid(odds[:, 0] - odds[:, 1])
    return -means[:, 0] - settings.beta * ratio


def _kto(settings: LossSettings, scores: PairScores, gap: Tensor) -> Tensor:
    """Ethayarajh et al. 2024 (https://arxiv.org/abs/2402.01306), equation 8: of answers with a verdict."""
    ratio, good = scores.log_ratio[:, 0], scores.side[:, 0] > 0
    gain = settings.beta * (ratio - gap)
    return torch.where(good, 1 - torch.sigmoid(gain), settings.undesirable_weight * (1 - torch.sigmoid(-gain)))


def _smoothed(margin: Tensor, wrong: float) -> Tensor:
    loss = -F.logsigmoid(margin)
    return loss if wrong == 0.0 else (1 - wrong) * loss - wrong * F.logsigmoid(-margin)


_LOSSES: dict[PreferenceLoss, Callable[[LossSettings, PairScores, Tensor], Tensor]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "orpo": _orpo,
    "simpo": _simpo,
    "kto": _kto,
}


def mismatched_gap(scores: PairScores) -> Tensor:
    """Return sum and number of the log-ratios of mismatched answers, ``[2]`` float64, without gradient."""
    ratio = torch.where(scores.is_pair, scores.log_ratio[:, 1].detach(), 0.0)
    return torch.stack([ratio.sum(dtype=torch.float64), scores.is_pair.sum().double()])
