"""Numbers of the expert load under the names that TensorBoard shows.

Legend: L layers, E experts, N tables.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from lightning_mixcn.metrics.expert_load import (
    LoadSums,
    coefficient_of_variation,
    dead_expert_fraction,
    effective_experts,
    imbalance_max_over_mean,
    shares,
)

# Each number, and which layer's is the worst; of the routers' confidence, neither end is.
_OF_COUNTS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "imbalance_max_over_mean": (imbalance_max_over_mean, Tensor.max),
    "coefficient_of_variation": (coefficient_of_variation, Tensor.max),
    "dead_expert_fraction": (dead_expert_fraction, Tensor.max),
    "effective_experts": (effective_experts, Tensor.min),
    "smallest_share": (lambda counts: shares(counts).amin(-1), Tensor.min),
}


def load_tags(prefix: str, sums: LoadSums) -> dict[str, float]:
    """Means over the layers, and the worst layer's.

    Args:
        prefix: First part of the names.
        sums: By layer ``[L]``.

    Returns:
        Empty if no token was counted.
    """
    if not int(sums.tokens.sum()):
        return {}
    tags: dict[str, float] = {}
    for name, (number, worst) in _OF_COUNTS.items():
        values_L = number(sums.counts)
        tags[f"{prefix}/{name}"] = float(values_L.mean())
        tags[f"{prefix}/{name}_worst_layer"] = float(worst(values_L))
    for name, values_L in _of_router(sums).items():
        tags[f"{prefix}/{name}"] = float(values_L.mean())
    return tags


def layer_tags(prefix: str, sums: LoadSums) -> dict[str, float]:
    """The same numbers of each layer, and each expert's share.

    Args:
        prefix: First part of the names.
        sums: By layer ``[L]``.

    Returns:
        ``<prefix>/layer_00/…``; empty if no token was counted.
    """
    if not int(sums.tokens.sum()):
        return {}
    numbers = {name: number(sums.counts) for name, (number, _) in _OF_COUNTS.items()} | _of_router(sums)
    numbers |= {f"share_{expert}": share_L for expert, share_L in enumerate(shares(sums.counts).unbind(-1))}
    return {
        f"{prefix}/layer_{layer:02d}/{name}": float(value)
        for name, values_L in numbers.items()
        for layer, value in enumerate(values_L)
    }


def divergence_tags(prefix: str, name: str, bits: Tensor, per_layer: bool) -> dict[str, float]:
    """A divergence: its mean over the layers, its largest, and on request each layer's.

    Args:
        prefix: First part of the names.
        name: What diverges, with its unit.
        bits: ``[L]``.
        per_layer: Give each layer's, too.
    """
    tags = {f"{prefix}/{name}": float(bits.mean()), f"{prefix}/{name}_largest_layer": float(bits.max())}
    if per_layer:
        tags |= {f"{prefix}/layer_{layer:02d}/{name}": float(value) for layer, value in enumerate(bits)}
    return tags


def _of_router(sums: LoadSums) -> dict[str, Tensor]:
    return {
        "router_entropy_nats": sums.entropy_nats / sums.tokens,
        "router_confidence": sums.confidence / sums.tokens,
    }
