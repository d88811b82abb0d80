"""Means over layers, worst layers, and each layer's numbers."""

import pytest
import torch

from lightning_mixcn.callbacks.expert_load.report import divergence_tags, layer_tags, load_tags
from lightning_mixcn.metrics.expert_load import LoadSums

COUNTS = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0]])
SUMS = LoadSums(
    counts=COUNTS,
    tokens=torch.tensor([20, 20]),
    entropy_nats=torch.tensor([20.0, 10.0], dtype=torch.float64),
    confidence=torch.tensor([8.0, 16.0], dtype=torch.float64),
)


def test_means_and_worst_layers() -> None:
    assert load_tags("experts", SUMS) == pytest.approx(
        {
            "experts/imbalance_max_over_mean": 2.5,
            "experts/imbalance_max_over_mean_worst_layer": 4.0,
            "experts/coefficient_of_variation": 3**0.5 / 2,
            "experts/coefficient_of_variation_worst_layer": 3**0.5,
            "experts/dead_expert_fraction": 0.375,
            "experts/dead_expert_fraction_worst_layer": 0.75,
            "experts/effective_experts": 2.5,
            "experts/effective_experts_worst_layer": 1.0,
            "experts/smallest_share": 0.125,
            "experts/smallest_share_worst_layer": 0.0,
            "experts/router_entropy_nats": 0.75,
            "experts/router_confidence": 0.6,
        }
    )


def test_each_layer() -> None:
    tags = layer_tags("experts", SUMS)
    assert tags["experts/layer_00/effective_experts"] == pytest.approx(4.0)
    assert tags["experts/layer_01/effective_experts"] == pytest.approx(1.0)
    assert tags["experts/layer_01/router_entropy_nats"] == 0.5
    assert [tags[f"experts/layer_01/share_{expert}"] for expert in range(4)] == [1.0, 0.0, 0.0, 0.0]
    assert len(tags) == 2 * (7 + 4)


def test_divergence() -> None:
    bits = torch.tensor([0.25, 0.75])
    assert divergence_tags("experts", "drift_bits", bits, per_layer=False) == {
        "experts/drift_bits": 0.5,
        "experts/drift_bits_largest_layer": 0.75,
    }
    assert divergence_tags("experts", "drift_bits", bits, per_layer=True)["experts/layer_01/drift_bits"] == 0.75


def test_nothing_counted_gives_no_tag() -> None:
    nothing = LoadSums(*(torch.zeros_like(part) for part in SUMS))
    assert load_tags("experts", nothing) == layer_tags("experts", nothing) == {}
