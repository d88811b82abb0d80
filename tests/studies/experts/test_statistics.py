"""Bootstrap intervals, against draws made one by one."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_mixcn.model import find_model, load_found
from lightning_mixcn.model.export.command import export
from lightning_mixcn.studies.experts import statistics as expert_similarity
from lightning_mixcn.studies.experts.statistics import Intervals, SourceDocuments, weight_cosines
from tests.model.adapters_on_disk import save_adapter
from tests.studies.experts.stock_experts import stock_model


def documents(count: int, shift: float, seed: int) -> SourceDocuments:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(20, 200, count)
    changed = np.stack([draw.normal(shift, 0.5, count) * sizes, np.zeros(count)])
    nats = (sizes * 2).astype(np.float64)
    return SourceDocuments(nats, nats, sizes, sizes * 3, changed, changed)


def one_by_one(part: SourceDocuments, seed: int) -> list[float]:
    draw, count = random.Random(seed), len(part.bytes)
    found = []
    for _ in range(4000):
        chosen = [draw.randrange(count) for _ in range(count)]
        nats = sum(float(part.changed_text_nats[0, index]) for index in chosen)
        found.append(nats / math.log(2) / sum(int(part.bytes[index]) for index in chosen))
    return sorted(found)


def test_interval_of_a_source() -> None:
    part = documents(30, 0.3, seed=0)
    change = Intervals([part]).of(0)
    draws = one_by_one(part, seed=1)
    width = draws[3900] - draws[100]
    assert change.bits_per_byte[0] == pytest.approx(part.changed_text_nats[0].sum() / math.log(2) / part.bytes.sum())
    assert change.low[0] == pytest.approx(draws[100], abs=0.08 * width)
    assert change.high[0] == pytest.approx(draws[3900], abs=0.08 * width)
    assert (change.low[1], change.high[1]) == (0, 0)
    assert change.is_clear().tolist() == [True, False]


def test_interval_of_a_difference() -> None:
    parts = [documents(30, 0.3, seed=0), documents(25, 0.1, seed=5)]
    change = Intervals(parts).difference(0, 1)
    pairs = zip(one_by_one(parts[0], seed=1), random.Random(0).sample(one_by_one(parts[1], seed=2), 4000), strict=True)
    draws = sorted(mine - other for mine, other in pairs)
    width = draws[3900] - draws[100]
    assert change.low[0] == pytest.approx(draws[100], abs=0.08 * width)
    assert change.high[0] == pytest.approx(draws[3900], abs=0.08 * width)


def test_the_same_documents_give_the_same_interval() -> None:
    first, again = (Intervals([documents(10, 0.3, seed=0)]).of(0) for _ in range(2))
    assert np.array_equal(first.low, again.low)


def test_one_document_has_no_interval() -> None:
    change = Intervals([documents(1, 0.3, seed=0)]).of(0)
    assert np.isfinite(change.bits_per_byte).all()
    assert np.isnan([change.low, change.high]).all()
    assert not change.is_clear().any()


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
