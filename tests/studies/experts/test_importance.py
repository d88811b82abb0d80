"""The fast path against whole models: stock transformers without the expert's weights, and our own with a hook."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mixcn.metrics import score_documents
from lightning_mixcn.model import load_mixtral
from lightning_mixcn.studies.experts.disabling import MODES, Batch, disabled_expert
from lightning_mixcn.studies.experts.importance import Arrays, ExpertImportance
from lightning_mixcn.testing import save_tiny_mixtral
from tests.studies.experts.stock_experts import evaluation_batches, stock_model


def study(model: Any, batch: Batch, rows: int, sources: int = 2) -> tuple[ExpertImportance, Arrays, dict[int, Arrays]]:
    importance = ExpertImportance(model, MODES, sources, rows)
    evaluated = importance.evaluate(batch)
    return importance, evaluated, dict(importance.disable(batch, evaluated, range(importance.num_layers)))


def plain_change(model: Any, batch: Batch, layer: int, disabled: Any, evaluated: Arrays) -> np.ndarray[Any, Any]:
    arguments = {name: batch[name] for name in ("input_ids", "position_ids", "labels", "document_ids")}
    with torch.no_grad(), disabled_expert(model, layer, disabled):
        scores = score_documents(model(**arguments).nll, batch)
    assert scores.document.tolist() == evaluated["document"].tolist()
    change: np.ndarray[Any, Any] = scores.text_nats.numpy() - evaluated["text_nats"]
    return change


@pytest.mark.parametrize("micro_batch_size", [3, 1], ids=["one pass", "several passes"])
@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("changes", [{}, {"num_local_experts": 5, "num_experts_per_tok": 3}], ids=["2 of 4", "3 of 5"])
def test_every_document_is_as_in_the_whole_model(
    changes: dict[str, int], length: int, micro_batch_size: int, texts: list[Path], tmp_path: Path
) -> None:
    """Short rows, some without a token that chose some expert, which are not run; and rows of several documents."""
    base = save_tiny_mixtral(tmp_path, initializer_range=0.25, **changes)
    model = load_mixtral(base, quantization="none", dtype="float32").eval()
    skipped = 0
    for batch in evaluation_batches(base, texts, length=length, rows=3, max_rows=2):
        importance, evaluated, parts = study(model, batch, micro_batch_size)
        for layer, part in parts.items():
            for number, disabled in enumerate(importance.variants):
                expected = plain_change(model, batch, layer, disabled, evaluated)
                np.testing.assert_allclose(part["text_nats"][number], expected, atol=2e-5, rtol=0)
        planned = importance.flops.planned(3 * length, 1)
        skipped += sum(int(part["flops"]) for part in [evaluated, *parts.values()]) < planned
    assert skipped or length > 12


def test_a_batch_goes_on_at_any_layer(routed_base: Path, texts: list[Path]) -> None:
    model = load_mixtral(routed_base, dtype="float32").eval()
    (batch, *_) = evaluation_batches(routed_base, texts, length=64, rows=2, max_rows=2)
    importance, evaluated, parts = study(model, batch, 2)
    for layers in ([1], [0, 2]):
        for layer, part in importance.disable(batch, evaluated, layers):
            assert layer in layers
            assert all(np.array_equal(part[name], parts[layer][name]) for name in part if name != "seconds")


def test_routing_is_stock_mixtrals(routed_base: Path, texts: list[Path]) -> None:
    """Loads, pairs chosen together, and the similarity of outputs."""
    model, stock = load_mixtral(routed_base, quantization="none", dtype="float32").eval(), stock_model(routed_base)
    (batch, *_) = evaluation_batches(routed_base, texts[:1], length=24, rows=1, max_rows=1)
    _, evaluated, parts = study(model, batch, 1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in stock.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append((args[0][0], module.gate(args[0][0])[2])))
    with torch.no_grad():
        stock(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    real_S = batch["document_ids"][0] >= 0
    for number, (input_SH, index_SK) in enumerate(seen):
        chosen = index_SK[real_S].tolist()
        for one in range(4):
            assert evaluated["load_counts"][0, number, one] == sum(one in pair for pair in chosen)
            for other in range(4):
                together = sum(one in pair and other in pair for pair in chosen)
                assert evaluated["pairs"][0, number, one, other] == together
        experts = stock.model.layers[number].mlp.experts
        ones = torch.ones(len(input_SH), 1)
        with torch.no_grad():
            outputs = [experts(input_SH, torch.full_like(index_SK[:, :1], expert), ones)[real_S] for expert in range(4)]
        cosine = torch.nn.functional.cosine_similarity(outputs[1], outputs[3]).mean()
        mean = parts[number]["cosines"] / parts[number]["cosine_tokens"]
        assert mean[1, 3] == pytest.approx(float(cosine), abs=1e-5)
        assert mean[3, 3] == pytest.approx(1)


def test_a_likelihood_that_is_not_finite_is_an_error(routed_base: Path, texts: list[Path]) -> None:
    model: Any = load_mixtral(routed_base, quantization="none", dtype="float32").eval()
    (batch, *_) = evaluation_batches(routed_base, texts, length=64, rows=2, max_rows=1)
    importance, evaluated, _ = study(model, batch, 2)
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="without expert 0 of layer 1 is not finite"):
        dict(importance.disable(batch, evaluated, [1]))
    with pytest.raises(FloatingPointError, match="unchanged model is not finite"):
        importance.evaluate(batch)
