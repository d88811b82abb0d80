"""Similarity of weights, against the weights that a merged checkpoint holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_mixcn.model import find_model, load_found
from lightning_mixcn.model.export.command import export
from lightning_mixcn.studies.experts import statistics as expert_similarity
from lightning_mixcn.studies.experts.statistics import weight_cosines
from tests.model.adapters_on_disk import save_adapter
from tests.studies.stock_experts import stock_model


def expected(stock: Any, layer: int, one: int, other: int) -> float:
    experts = stock.model.layers[layer].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    pairs = [
        (matrices[one].flatten(), matrices[other].flatten()) for matrices in (gate, up, experts.down_proj.detach())
    ]
    return float(sum(F.cosine_similarity(*pair, dim=0) for pair in pairs) / 3)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_cosines_are_those_of_the_merged_weights(
    quantization: str, routed_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole matrices and pieces of them; with an adapter, which is part of the weights."""
    adapter = tmp_path / "adapter"
    save_adapter(routed_base, adapter)
    precision: Any = {"none": "original", "nf4": "dequantised"}[quantization]
    export(str(adapter), str(tmp_path / "merged"), base=precision, dtype="float32")
    stock = stock_model(tmp_path / "merged")
    model = load_found(find_model(str(adapter)), quantization=quantization, dtype="float32")
    whole = weight_cosines(model, 1)
    monkeypatch.setattr(expert_similarity, "_CHUNK", 32 * 7)
    torch.testing.assert_close(weight_cosines(model, 1), whole)
    for one in range(4):
        for other in range(4):
            assert float(whole[one, other]) == pytest.approx(expected(stock, 1, one, other), abs=1e-5)
