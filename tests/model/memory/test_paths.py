"""What the expert block's paths need on a GPU: counts against the bytes of living tensors, at the sizes of 8x7B."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.model import build_mixtral, set_activation_checkpointing
from lightning_mixcn.model.attention.packed import PackedDocuments
from lightning_mixcn.model.experts import path as expert_path
from lightning_mixcn.model.experts.path import FASTEST, PATHS, FastestPaths, training_path
from lightning_mixcn.model.memory.budget import activation_bytes, fitting_modes
from lightning_mixcn.model.memory.layer import LayerCounter, MicroBatch, model_activations
from lightning_mixcn.model.memory.optimizer import MemoryTracker, OptimizerMemory
from lightning_mixcn.model.memory.paths import PATH_MEMORY
from lightning_mixcn.model.memory.plan import Run, Sharing, plan_memory
from lightning_mixcn.testing import tiny_config, tiny_mixtral_config

SIZES: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_attention_heads": 32, "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
}  # fmt: skip


def model_of(layers: int, dropout: float, targets: Any = "all-linear", **changes: Any) -> Any:
    lora = LoraConfig(r=64, lora_dropout=dropout, target_modules=targets)
    config = tiny_mixtral_config(**(SIZES | {"num_hidden_layers": layers} | changes))
    return build_mixtral(config, lora=lora, device="meta").train()


def test_every_path_is_counted() -> None:
    assert PATH_MEMORY.keys() == PATHS.keys()


@pytest.mark.usefixtures("cuda_on_meta")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [4096, 32768])
@pytest.mark.parametrize(
    ("dropout", "targets"), [(0.0, "all-linear"), (0.05, "all-linear"), (0.05, ["w1"]), (0.0, ["w2"])], ids=str
)
def test_an_expert_block(path: str, tokens: int, dropout: float, targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    experts = model_of(1, dropout, targets).get_base_model().model.layers[0].mlp.experts
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    index = torch.empty(tokens, 2, dtype=torch.int64, device="meta")
    weight = torch.empty(tokens, 2, device="meta", requires_grad=True)
    with MemoryTracker() as live:
        y: Tensor = experts(x, index, weight)
        kept = live.now - y.nbytes
        forward, live.peak = live.peak - kept, live.now
        y.backward(torch.empty_like(y))
        backward = live.peak - kept - y.nbytes  # of y and its gradient one is there in a model
    sizes = LayerCounter(MicroBatch(1, tokens), torch.bfloat16, "cuda", 2, path).block_sizes(experts)
    assert PATH_MEMORY[path].forward(sizes) == pytest.approx(forward, rel=0.06)
    assert PATH_MEMORY[path].backward(sizes) == pytest.approx(backward, rel=0.06)


@pytest.mark.usefixtures("cuda_on_meta")
@pytest.mark.parametrize("tokens", [4096, 32768])
@pytest.mark.parametrize(
    ("dropout", "targets"),
    [(0.0, "all-linear"), (0.05, "all-linear"), (0.05, ["q_proj"]), (0.0, ["o_proj"]), (0.05, ["w1"])],
    ids=str,
)
def test_attention(tokens: int, dropout: float, targets: Any) -> None:
    check_attention(model_of(1, dropout, targets), tokens)


@pytest.mark.usefixtures("cuda_on_meta")
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_attention_with_norms_of_its_own(family: str, dropout: float) -> None:
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1}
    config = tiny_config(family, **sizes, **({} if family == "olmoe" else {"head_dim": 128}))
    lora = LoraConfig(r=64, lora_dropout=dropout, target_modules="all-linear")
    check_attention(build_mixtral(config, lora=lora, device="meta").train(), 4096)


def check_attention(model: Any, tokens: int) -> None:
    """Compare what a layer's attention keeps, and its peak in backward, with living tensors."""
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    layer = model.get_base_model().model.layers[0]
    attention, shape = layer.self_attn, (tokens // 4096, 4096)
    x = torch.empty(*shape, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angle = torch.empty(*shape, 128, dtype=torch.bfloat16, device="meta")
    documents = PackedDocuments(torch.empty(9, dtype=torch.int32, device="meta"), 4096)
    with MemoryTracker() as live:
        y: Tensor = attention(x, (angle, angle), documents=documents)[0]
        kept, live.peak = live.now - y.nbytes, live.now
        y.backward(torch.empty_like(y))
        backward = live.peak - kept - y.nbytes
    counter = LayerCounter(MicroBatch(*shape, packed=True), torch.bfloat16, "cuda", 2, "loop")
    planned, _ = counter.layer(layer, needs_gradient=True)
    shared = counter._shared_input([attention.q_proj, attention.k_proj, attention.v_proj])
    assert planned.attention - shared * x.nbytes == pytest.approx(kept, rel=0.01)
    assert planned.attention_backward == pytest.approx(backward, rel=0.07)


CASES = [(4096, "selective", 0.0), (4096, "selective", 0.05), (32768, "full", 0.05)]


@pytest.mark.usefixtures("cuda_on_meta")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("tokens", "mode", "dropout"), CASES, ids=str)
def test_a_model(path: str, tokens: int, mode: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two micro-batches that accumulate."""
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    model, shape = model_of(3, dropout), (tokens // 4096, 4096)
    set_activation_checkpointing(model, mode)
    ids, documents = (torch.empty(shape, dtype=dtype, device="meta") for dtype in (torch.int64, torch.int32))
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "document_ids": documents}
    with MemoryTracker() as live:
        for _ in range(2):
            live.peak = live.now
            model(**batch, output_router_logits=True, use_cache=False).loss.backward()
    run = Run(MicroBatch(*shape, packed=True), [mode] * 3, "cuda", True, OptimizerMemory(0, 0), Sharing())
    plan = plan_memory(model, run)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert plan.peak == pytest.approx(live.peak + parameters, rel=0.05)
    assert plan.peak - plan.held == pytest.approx(live.peak, rel=0.08)


def cuda_plan(model: Any, tokens: int, modes: list[str]) -> Any:
    return plan_memory(model, Run(MicroBatch(1, tokens), modes, "cuda", True, OptimizerMemory(0, 0), Sharing()))


def test_a_plan_asks_for_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded stacks of a projection, 0.94 GB instead of a matrix of 0.12; all rows of x at 32,768 tokens."""
    model = model_of(2, 0.0)
    peaks = {}
    for path in ("loop", "grouped"):
        monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
        peaks[path] = [cuda_plan(model, tokens, ["full"] * 2).peak for tokens in (4096, 32768)]
    more = [grouped - loop for loop, grouped in zip(*peaks.values(), strict=True)]
    assert 0.8e9 < more[0] < 1.3e9
    assert 2.5e9 < more[1] < 5e9


def test_auto_computes_more_again_where_the_path_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = model_of(4, 0.0), Run(MicroBatch(1, 4096), [], "cuda", True, OptimizerMemory(0, 0), Sharing())
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "loop")
    all_fit = ["selective"] * 4
    budget = activation_bytes(plan_memory(model, replace(run, modes=all_fit)))
    assert fitting_modes(model, run, budget, usable=0) == all_fit
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    modes = fitting_modes(model, run, budget, usable=0)
    assert modes.count("full") > 0
    assert activation_bytes(plan_memory(model, replace(run, modes=modes))) <= budget


@pytest.mark.parametrize("winner", ["grouped", "decode"])
@pytest.mark.parametrize("capability", [(9, 0), (8, 0), None])
def test_the_path_of_a_device(winner: str, capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner of a capability, where it can compute; without a GPU that of GPUs which are not listed."""
    monkeypatch.delenv("MIXCN_EXPERT_PATH", raising=False)
    table = ((8.0, "loop"), (float("inf"), winner))
    monkeypatch.setitem(FASTEST, "9.0", FastestPaths(table, ()))
    monkeypatch.setitem(FASTEST, "8.0", FastestPaths(table, ()))
    monkeypatch.setitem(FASTEST, "cuda", FastestPaths(table, ()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(expert_path, "_capability", lambda _: capability)
    monkeypatch.setattr(expert_path, "has_triton", lambda: True)
    experts = model_of(1, 0.0, hidden_size=32, intermediate_size=64).get_base_model().model.layers[0].mlp.experts
    projections = experts.gate_proj, experts.up_proj, experts.down_proj
    found = [training_path(projections, tokens, 2, torch.bfloat16, "cuda") for tokens in (16, 64)]
    assert found == ["loop", "loop" if capability == (8, 0) else winner]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_no_such_path(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fast")
    with pytest.raises(UserError, match="`MIXCN_EXPERT_PATH='fast'` is not known"):
        model_activations(model_of(1, 0.0), MicroBatch(1, 64), device_type)
