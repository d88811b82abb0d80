"""REAP's saliency, against every expert computed densely in float64 for each document alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.cli import main
from lightning_mixcn.model import load_moe
from lightning_mixcn.model.architectures import MODEL_TYPES
from lightning_mixcn.studies.experts.importance import ExpertImportance
from lightning_mixcn.studies.experts.work import BatchParts, ExpertResults
from lightning_mixcn.testing import save_tiny_model
from tests.studies.experts.experts_command import arguments, lines_of
from tests.studies.experts.stock_experts import evaluation_batches, stock_model

pytestmark = pytest.mark.usefixtures("no_pictures")

LENGTH = 48
MANY: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 16, "num_experts_per_tok": 3},
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8},
    "qwen3_moe": {"num_experts": 64, "num_experts_per_tok": 8},
}


@pytest.fixture(scope="module", params=MODEL_TYPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of a family in which some experts get no token."""
    family: str = request.param
    return save_tiny_model(tmp_path_factory.mktemp(family), family, initializer_range=0.25, **MANY[family])


def measured(base: Path, texts: list[Path], rows: int) -> ExpertResults:
    model = load_moe(base, quantization="none", dtype="float32").eval()
    importance = ExpertImportance(model, (), len(texts), rows)
    batches = evaluation_batches(base, texts, LENGTH, rows, max_rows=5)
    parts = [BatchParts(importance.evaluate(batch), []) for batch in batches]
    similarity = np.ones((importance.num_layers, importance.num_experts, importance.num_experts))
    return ExpertResults.of(["zh", "en"], [], parts, similarity)


def dense_saliency(mlp: Any, x_nH: Tensor, top_k: int, normalises: bool) -> tuple[Tensor, Tensor]:
    """Return the sum over tokens and the number of tokens, ``[E]``."""
    scores_nE = F.linear(x_nH, mlp.gate.weight).softmax(-1)
    is_chosen_nE = scores_nE >= scores_nE.sort(descending=True).values[:, top_k - 1 : top_k]
    weights_nE = scores_nE * is_chosen_nE
    if normalises:
        weights_nE = weights_nE / weights_nE.sum(-1, keepdim=True)
    gate_nEI, up_nEI = torch.einsum("nh,eih->nei", x_nH, mlp.experts.gate_up_proj).chunk(2, dim=-1)
    output_nEH = torch.einsum("nei,ehi->neh", F.silu(gate_nEI) * up_nEI, mlp.experts.down_proj)
    return (weights_nE * output_nEH.square().sum(-1).sqrt()).sum(0), is_chosen_nE.sum(0)


@torch.no_grad()
def expected(base: Path, texts: list[Path]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return mean and number of tokens of each source, layer and expert, from each document's pieces alone."""
    stock = stock_model(base).double()
    stock.set_experts_implementation("eager")  # the only one that knows float64
    normalises = stock.config.model_type == "mixtral" or stock.config.norm_topk_prob
    top_k, inputs = stock.config.num_experts_per_tok, dict[int, Tensor]()
    for number, layer in enumerate(stock.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, number=number: inputs.update({number: args[0][0]}))
    shape = len(texts), stock.config.num_hidden_layers, stock.config.num_local_experts
    total_GLE, tokens_GLE = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64)
    for batch in evaluation_batches(base, texts, LENGTH, rows=1, max_rows=5):
        documents_S = batch["document_index"][0]
        for document in sorted(set(documents_S.tolist()) - {-1}):
            place = (documents_S == document).nonzero().flatten()
            stock(batch["input_ids"][:, place])
            source = int(batch["source_ids"][0, place[0]])
            for number, layer in enumerate(stock.model.layers):
                total_E, tokens_E = dense_saliency(layer.mlp, inputs[number], top_k, normalises)
                total_GLE[source, number] += total_E
                tokens_GLE[source, number] += tokens_E
    return (total_GLE / tokens_GLE.clamp_min(1)).numpy(), tokens_GLE.numpy()


def test_it_is_the_mean_over_an_expert_s_tokens(base: Path, texts: list[Path]) -> None:
    """Rows of several documents with padding, in micro-batches of any size."""
    saliency_GLE, tokens_GLE = expected(base, texts)
    assert 0 < (tokens_GLE == 0).sum() < tokens_GLE.size / 2
    for rows in (1, 2, 5):
        found = measured(base, texts, rows)
        assert np.array_equal(found.loads["load_counts"], tokens_GLE)
        np.testing.assert_allclose(found.saliency(), saliency_GLE, rtol=2e-5, atol=0)
        assert not found.saliency()[tokens_GLE == 0].any()
        np.testing.assert_allclose(found.saliency_in_layer().mean(-1), 1)


def test_one_pass_writes_it(base: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [*arguments(base, out, texts, "--quantization=none", "--max_tokens=240"), "--mode=saliency"]
    assert main(command) == 0
    saliency_GLE, tokens_GLE = expected(base, texts)
    printed = capsys.readouterr()
    (cost,) = (line for line in printed.err.splitlines() if line.startswith("mode saliency: "))
    assert "mode saliency: 1 forward pass over 480 tokens, " in cost
    assert "FLOP, at least " in cost
    lines = lines_of(out / "experts.csv")
    assert len(lines) == tokens_GLE.size
    for line in lines:
        place = ["zh", "en"].index(line["source"]), int(line["layer"]), int(line["expert"])
        assert line["mode"] == "saliency"
        assert int(line["tokens"]) == tokens_GLE[place]
        assert float(line["saliency"]) == pytest.approx(saliency_GLE[place], rel=2e-5)
    assert {file.name for file in out.iterdir()} == {
        "coactivation.csv", "coactivation.png", "experts.csv", "experts.json", "ranking.txt", "routing.csv",
        "routing_layers.csv", "saliency.png", "similarity.csv", "weight_similarity.png",
    }  # fmt: skip
    report = json.loads((out / "experts.json").read_text(encoding="utf-8"))
    assert report["flops"]["done"] == report["flops"]["planned"] == report["flops"]["forward_pass"]
    without = [int((tokens_LE == 0).sum()) for tokens_LE in tokens_GLE]
    assert [figures["experts_without_tokens"] for figures in report["saliency"].values()] == without
    for name, count in zip(("zh", "en"), without, strict=True):
        said = f"{count} of {tokens_GLE[0].size} experts have no token of {name}: their saliency is 0"
        assert (said in printed.out) == bool(count)
    assert main(command) == 0
    assert "was finished before" in capsys.readouterr().err


def test_tasks_need_a_disabled_expert(
    routed_base: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(routed_base, tmp_path / "out", texts, "--tasks=ceval-valid", "--mode=saliency")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "`tasks` need a disabled expert, but `mode=saliency` disables none. Use mode mask, zero or both" in error
    assert error.count("\n") == 1
