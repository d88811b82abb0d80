"""Log-probabilities of pairs of answers, and how the better one fares: sums and counts, divided once.

Legend: B rows, S positions of a row, P pairs that a batch can have, of which few are there.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from .likelihood import per_position, scored_positions


class PairScores(NamedTuple):
    """Sums over the answers of a batch's pairs, ``[P, 2]``: chosen and rejected, or judged and mismatched.

    Args:
        log_probability: Of the model, in nats, float32, differentiable.
        reference: Of the reference likewise, without gradient; zeros for losses without one.
        divergence: Half the squared log-ratio to the reference of each token, added up, float64, without gradient.
        tokens: Number of the answer's tokens, int64.
        side: 1 for a chosen answer, −1 for a rejected one, 0 for a mismatched one, int64.
        source: ``[P]`` int64, number of the pair's source.
        is_pair: ``[P]`` bool, both answers have tokens.
        has_reference: True if there is a reference.
    """

    log_probability: Tensor
    reference: Tensor
    divergence: Tensor
    tokens: Tensor
    side: Tensor
    source: Tensor
    is_pair: Tensor
    has_reference: bool

    @property
    def log_ratio(self) -> Tensor:
        """Log-probability beyond that of the reference, ``[P, 2]``."""
        return self.log_probability - self.reference

    @property
    def mean_log_probability(self) -> Tensor:
        """Log-probability a token, ``[P, 2]``."""
        return self.log_probability / self.tokens.clamp_min(1)


def score_pairs(nll: Tensor, reference_nll: Tensor | None, batch: dict[str, Tensor]) -> PairScores:
    """Sum a batch by answer; the second answer of a pair has the document number after that of the first.

    Args:
        nll: Loss of each label in nats, float32 ``[B, S]``, 0 where there is none.
        reference_nll: The reference's likewise; None without one.
        batch: Batch of a `PreferenceDataModule`: ``labels``, ``document_ids``, ``source_ids`` and ``sides``.
    """
    labels_BS, documents_BS = batch["labels"], batch["document_ids"]
    rows, length = labels_BS.shape
    width = length + length % 2  # a row has at most S answers; padding, which has no label, counts as its first
    row_B1 = torch.arange(rows, device=labels_BS.device)[:, None]
    answer_N = (row_B1 * width + documents_BS.clamp_min(0)).flatten()
    scored_BS = scored_positions(labels_BS)

    def sums(values_BS: Tensor, dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros(rows * width, dtype=dtype, device=values_BS.device)
        return zeros.index_add(0, answer_N, values_BS.flatten().to(dtype)).view(-1, 2)

    tokens_P2 = sums(scored_BS, torch.int64)
    reference_BS = torch.zeros_like(nll) if reference_nll is None else reference_nll
    log_ratio_BS = (reference_BS - nll.detach()).double()
    sources_BS = torch.where(scored_BS, per_position(batch["source_ids"], labels_BS), 0)
    return PairScores(
        # In float64, so that the order in which CUDA adds leaves no trace in float32.
        -sums(nll, torch.float64).float(),
        -sums(reference_BS, torch.float64).float(),
        # Schulman's k2 (http://joschu.net/blog/kl-approx.html). His k3 exponentiates the log-ratio, and is the better
        # estimate where the model has written the answers; of others' a few tokens of rejected ones would rule it.
        sums(log_ratio_BS.square() / 2, torch.float64),
        tokens_P2,
        sums(torch.where(scored_BS, batch["sides"], 0), torch.int64).sign(),
        sums(sources_BS, torch.int64)[:, 0] // tokens_P2[:, 0].clamp_min(1),
        (tokens_P2 > 0).all(1),
        reference_nll is not None,
    )


_ANSWER = ("answers", "reward", "nats", "tokens", "divergence", "compared")  # of each side
_OF_PAIRS = ("pairs", "right", "loss", "opposed", "likelier", "lead")
FIGURES = (*_OF_PAIRS, *(f"{name}_{side}" for side in ("chosen", "rejected") for name in _ANSWER))
"""Sums of `pair_sums`, in their order."""


def pair_sums(scores: PairScores, losses: Tensor, rewards: Tensor, origin: Tensor, source: int | None = None) -> Tensor:
    """Add up what is told of a batch's pairs.

    Args:
        scores: See `score_pairs`.
        losses: Loss of each pair ``[P]``.
        rewards: Implicit rewards ``[P, 2]``.
        origin: Reward above which an answer with a verdict is taken for a good one, a scalar.
        source: The source whose pairs are counted; None counts all.

    Returns:
        ``[figures]`` float64, see `FIGURES`.
    """
    counted_P = scores.is_pair if source is None else scores.is_pair & (scores.source == source)
    judged_P = scores.side[:, 1] == 0  # the second answer belongs to another prompt
    alone_P = (rewards[:, 0] > origin) == (scores.side[:, 0] > 0)
    right_P = torch.where(judged_P, alone_P, rewards[:, 0] > rewards[:, 1])
    parts = [counted_P, counted_P & right_P, torch.where(counted_P, losses.detach(), 0.0)]
    parts += _by_likelihood(scores, counted_P)
    for side in (1, -1):
        of_side_P2 = (scores.side == side) & counted_P[:, None]
        values = (
            torch.ones_like(rewards),
            rewards,
            -scores.log_probability.detach(),
            scores.tokens,
            scores.divergence,
            scores.tokens * scores.has_reference,
        )
        parts += [torch.where(of_side_P2, value, 0) for value in values]
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


def _by_likelihood(scores: PairScores, counted_P: Tensor) -> list[Tensor]:
    """Return ``[P]`` each: is it a chosen and a rejected answer, is the chosen one likelier a token, by what."""
    lead_P = torch.sub(*scores.mean_log_probability.detach().unbind(1))
    opposed_P = counted_P & (scores.side[:, 1] < 0)
    return [opposed_P, opposed_P & (lead_P > 0), torch.where(opposed_P, lead_P, 0.0)]


def pair_figures(sums: Tensor) -> dict[str, float]:
    """Divide sums of `pair_sums` by their counts.

    Returns:
        ``pairs`` (their number), ``accuracy`` (share of pairs whose chosen answer has the higher reward),
        ``preference_loss``, and of the ``chosen`` and the ``rejected`` answers ``reward_…``,
        ``nll_…_nats_per_token``, ``answer_tokens_…`` and, where there is a reference, ``kl_…_nats_per_token``: the
        divergence from it, estimated on the answers' tokens; ``reward_margin`` between them. What has no answers is
        left out. Of pairs with both sides ``accuracy_by_likelihood`` (share whose chosen answer is the likelier one a
        token) and ``likelihood_margin_nats_per_token``, which compare models trained by different losses.
    """
    found = dict(zip(FIGURES, sums.tolist(), strict=True))
    if not found["pairs"]:
        return {}
    pairs = found["pairs"]
    figures = {"pairs": pairs, "accuracy": found["right"] / pairs, "preference_loss": found["loss"] / pairs}
    for side in ("chosen", "rejected"):
        if answers := found[f"answers_{side}"]:
            figures[f"reward_{side}"] = found[f"reward_{side}"] / answers
            figures[f"nll_{side}_nats_per_token"] = found[f"nats_{side}"] / found[f"tokens_{side}"]
            figures[f"answer_tokens_{side}"] = found[f"tokens_{side}"] / answers
            if compared := found[f"compared_{side}"]:
                figures[f"kl_{side}_nats_per_token"] = found[f"divergence_{side}"] / compared
    if "reward_chosen" in figures and "reward_rejected" in figures:
        figures["reward_margin"] = figures["reward_chosen"] - figures["reward_rejected"]
    if opposed := found["opposed"]:  # the same for every loss, whose rewards differ
        figures["accuracy_by_likelihood"] = found["likelier"] / opposed
        figures["likelihood_margin_nats_per_token"] = found["lead"] / opposed
    return figures


class SourcePairs(Metric):
    """Figures of pairs by source, over batches and ranks.

    Args:
        num_sources: Number of sources; they are numbered from 0.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    sums: Tensor

    def __init__(self, num_sources: int) -> None:
        """Make empty sums."""
        super().__init__()
        self.num_sources = num_sources
        zeros = torch.zeros(num_sources, len(FIGURES), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, scores: PairScores, losses: Tensor, rewards: Tensor, origin: Tensor) -> None:
        """Add one batch; see `pair_sums`."""
        for source in range(self.num_sources):
            self.sums[source] += pair_sums(scores, losses, rewards, origin, source)

    def compute(self) -> dict[int, dict[str, float]]:
        """Return `pair_figures` of every source that had pairs, by its number."""
        figures = {source: pair_figures(sums) for source, sums in enumerate(self.sums.cpu())}
        return {source: found for source, found in figures.items() if found}
