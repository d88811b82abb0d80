"""Load of a mixture of experts: tokens of each expert, and numbers made of them.

Legend: T tokens, E experts, K experts a token, L layers, G groups of tokens (such as sources), N tables to compare.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mixcn.errors import UserError


class LoadSums(NamedTuple):
    """Sums over tokens, by group and layer ``[G, L]``, or by layer alone ``[L]`` after `of_groups`.

    Args:
        counts: int64 ``[..., E]``, how often each expert was chosen; each token counts K times.
        tokens: int64, tokens.
        entropy_nats: float64, sum of the entropy of each token's distribution over all experts.
        confidence: float64, sum of each token's largest probability.
    """

    counts: Tensor
    tokens: Tensor
    entropy_nats: Tensor
    confidence: Tensor

    def of_groups(self, groups: Iterable[int]) -> "LoadSums":
        """Add up the given groups."""
        chosen = list(groups)
        return LoadSums(*(part[chosen].sum(0) for part in self))

    def numbers(self) -> dict[str, Tensor]:
        """Return the imbalance of the experts and the routers' confidence in numbers, ``[...]`` each, by name."""
        return load_numbers(self.counts) | {
            "router_entropy_nats": self.entropy_nats / self.tokens,
            "router_confidence": self.confidence / self.tokens,
        }


class ExpertLoad(Metric):
    """Expert load by group of tokens and layer, counted in int64 and float64 over batches and ranks.

    Counting does not wait for the device, and its result does not depend on the order that a GPU adds in.

    Args:
        num_groups: Groups of tokens, numbered from 0.
        num_layers: Layers of the model.
        num_experts: Experts of a layer.

    >>> load = ExpertLoad(num_groups=1, num_layers=1, num_experts=4)
    >>> load.update(0, torch.zeros(3, 4), torch.tensor([[0, 1], [0, 2], [3, 1]]), torch.tensor([0, 0, -1]))
    >>> load.compute().counts.tolist()
    [[[2, 1, 1, 0]]]
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor
    tokens: Tensor
    entropy_nats: Tensor
    confidence: Tensor

    def __init__(self, num_groups: int, num_layers: int, num_experts: int) -> None:
        """Make empty sums."""
        super().__init__()
        shape = (num_groups, num_layers)
        if min(*shape, num_experts) < 1:
            raise UserError(
                f"`num_groups={num_groups}`, `num_layers={num_layers}`, `num_experts={num_experts}`: expected at least "
                "one of each"
            )
        self.num_groups, self.num_experts = num_groups, num_experts
        self.add_state("counts", torch.zeros(*shape, num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("entropy_nats", "confidence"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, layer: int, logits: Tensor, experts: Tensor, groups: Tensor) -> None:
        """Add one layer's choices for a batch.

        Args:
            layer: Number of the layer.
            logits: ``[T, E]``, router logits, any float dtype.
            experts: ``[T, K]`` int64, the chosen experts.
            groups: ``[T]`` integers, the group of each token; −1 for one that does not count, such as padding.
        """
        log_p_TE = logits.detach().float().log_softmax(-1)
        p_TE = log_p_TE.exp()
        chosen_TE = torch.zeros_like(p_TE, dtype=torch.float64).scatter_(1, experts, 1.0)
        entropy_T = -(p_TE * log_p_TE).sum(-1)
        of_token = torch.stack((torch.ones_like(entropy_T), entropy_T, p_TE.amax(-1)), 1).double()
        # A product with zero would keep the NaN that a router may make of padding.
        features = torch.cat((chosen_TE, of_token), 1).where(groups[:, None] >= 0, 0.0)
        # Sums as one float64 product: exact for counts up to 2⁵³, and deterministic on a GPU, unlike `index_add_`.
        is_in_GT = groups == torch.arange(self.num_groups, device=groups.device)[:, None]
        sums = is_in_GT.double() @ features
        self.counts[:, layer] += sums[:, : self.num_experts].long()
        self.tokens[:, layer] += sums[:, self.num_experts].long()
        self.entropy_nats[:, layer] += sums[:, self.num_experts + 1]
        self.confidence[:, layer] += sums[:, self.num_experts + 2]

    def compute(self) -> LoadSums:
        """Return the sums over all ranks, ``[G, L]``."""
        return LoadSums(self.counts, self.tokens, self.entropy_nats, self.confidence)


def shares(counts: Tensor) -> Tensor:
    """Return the share of each expert in its layer's choices.

    Args:
        counts: int64 ``[..., E]``.

    Returns:
        float64 ``[..., E]`` that sum to 1; NaN where nothing was counted.
    """
    return counts.double() / counts.sum(-1, keepdim=True)


def load_numbers(counts: Tensor) -> dict[str, Tensor]:
    """Return the numbers that tell how even loads are, each ``[..., E]`` → ``[...]``; NaN where nothing was counted.

    Args:
        counts: int64 ``[..., E]``.

    Returns:
        * ``imbalance_max_over_mean``: load of the busiest expert over the mean; 1 if even, E / K if always the same.
        * ``coefficient_of_variation``: standard deviation of the loads over their mean; 0 if even.
        * ``dead_expert_fraction``: fraction of experts that no token chose.
        * ``effective_experts``: exponential of the entropy of the shares: as many even experts have this entropy.
        * ``routing_entropy``: entropy of the shares over its largest value, log E: 1 if even, 0 if one expert has all.
          Routing has collapsed where it falls (routing collapse: arXiv 2605.17598).
        * ``smallest_share``: share of the expert with the least load.

    >>> round(float(load_numbers(torch.tensor([40, 40, 20, 20]))["imbalance_max_over_mean"]), 2)
    1.33
    """
    experts, parts = counts.shape[-1], shares(counts)
    entropy = _entropy(parts)
    return {
        "imbalance_max_over_mean": parts.amax(-1) * experts,
        "coefficient_of_variation": parts.std(-1, correction=0) * experts,
        "dead_expert_fraction": torch.where(counts.sum(-1) > 0, (counts == 0).double().mean(-1), math.nan),
        "effective_experts": entropy.exp(),
        "routing_entropy": entropy / math.log(max(experts, 2)),
        "smallest_share": parts.amin(-1),
    }


def jensen_shannon_bits(share_tables: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence between distributions over experts, all of the same weight.

    Lin, Divergence measures based on the Shannon entropy, 1991, section IV.

    Args:
        share_tables: float64 ``[N, ..., E]``; each sums to 1 over the last dimension.

    Returns:
        float64 ``[...]``, in bits: 0 if all are alike, log2(N) if no two have an expert in common.

    >>> float(jensen_shannon_bits(torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
    1.0
    """
    between = _entropy(share_tables.mean(0)) - _entropy(share_tables).mean(0)
    # Rounding can give a hair less than 0.
    return between.clamp_min(0) / math.log(2)


def _entropy(p: Tensor) -> Tensor:
    return Tensor.sum(torch.special.entr(p), -1)
