"""The path `fused` where it differs from the others: masters as factors, dropout by keys, and what it keeps."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_mixcn.model import load_mixtral, set_activation_checkpointing
from lightning_mixcn.model.experts import fused
from lightning_mixcn.model.experts.fused import fused_loop
from lightning_mixcn.model.experts.loop import Dropout, ExpertWeights
from lightning_mixcn.model.experts.path import PATHS
from lightning_mixcn.model.experts.routing import Routing, route_rows_on_device
from lightning_mixcn.model.nf4.storage import DenseWeight, NF4Weight, Weight
from tests.model.philox import dropout_mask
from tests.model.trained_values import draw_trained

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE = 21, 3, 64, 130
DROPOUT = Dropout(0.25, 11)


@pytest.fixture(autouse=True)
def interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off; on a GPU, test_gradients_on_a_gpu has this path")


def make_weights(quantization: str) -> ExpertWeights:
    def weight(*shape: int) -> Weight:
        made: Weight = NF4Weight(shape) if quantization == "nf4" else DenseWeight(shape, torch.float32)  # type: ignore[arg-type]  # three sizes
        made.write(0, torch.randn(shape).flatten() * 0.1)
        return made

    gate, up = (weight(EXPERTS, INTERMEDIATE, HIDDEN) for _ in range(2))
    return gate, up, weight(EXPERTS, HIDDEN, INTERMEDIATE)


def make_masters(ranks: tuple[int, int, int]) -> list[Tensor | None]:
    sizes = ((HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN))
    masters: list[Tensor | None] = []
    for rank, (inputs, outputs) in zip(ranks, sizes, strict=True):
        if rank == 0:
            masters += [None, None]
            continue
        masters += [
            (torch.randn(EXPERTS, *shape) * 0.2).requires_grad_() for shape in ((rank, inputs), (outputs, rank))
        ]
    return masters


def dense(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    matrices: list[Tensor],
    scales: tuple[float, ...],
    masters: list[Tensor | None],
    dropout: Dropout,
) -> Tensor:
    """Σₖ weight · down(silu(gate x) ⊙ up x), choice by choice, in float64."""
    y = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, choice = torch.where(index == expert)

        def project(number: int, rows: Tensor, stream: int, expert: int = expert, token: Tensor = token) -> Tensor:
            a, b = masters[2 * number], masters[2 * number + 1]
            out = rows @ matrices[number][expert].t()
            if a is None or b is None:
                return out
            dropped = rows * dropout_mask(token, rows.shape[1], *dropout, stream)
            return out + scales[number] * (dropped @ a[expert].t() @ b[expert].t())

        rows = x[token]
        h = F.silu(project(0, rows, 0)) * project(1, rows, 0)
        y = y.index_add(0, token, weight[token, choice, None] * project(2, h, 1 + expert))
    return y


# Ranks of gate, up and down; 0: no adapter.
@pytest.mark.parametrize(
    ("dtype", "quantization", "dropout", "tolerance", "ranks"),
    [(torch.float32, "nf4", Dropout(), 1e-5, (8, 8, 8)), (torch.float32, "none", DROPOUT, 1e-5, (3, 5, 2))]
    + [
        (torch.float16, "nf4", DROPOUT, 4e-3, ranks)
        for ranks in [(8, 8, 8), (3, 5, 2), (0, 6, 0), (4, 0, 3), (0, 0, 8), (0, 0, 0)]
    ],
    ids=str,
)
def test_masters_are_factors(
    dtype: torch.dtype, quantization: str, dropout: Dropout, tolerance: float, ranks: tuple[int, int, int]
) -> None:
    torch.manual_seed(sum(ranks))
    weights, masters, scales = make_weights(quantization), make_masters(ranks), (2.0, 0.5, 3.0)
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    index = torch.rand(TOKENS, EXPERTS).topk(2).indices
    index[:, 0], index[:, 1] = index.amin(1), 2  # the second expert has few rows
    index[:, 0].clamp_(max=1)
    weight = torch.rand(TOKENS, 2).requires_grad_()
    upstream = torch.randn(TOKENS, HIDDEN).to(dtype)
    y = fused_loop(x, index, weight, weights, dropout, scales, *masters)
    y.backward(upstream)
    leaves = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (x, weight, *masters)]
    matrices = [part.flat(dtype).view(part.shape).double() for part in weights]
    assert leaves[0] is not None
    assert leaves[1] is not None
    expected = dense(leaves[0], index, leaves[1], matrices, scales, leaves[2:], dropout)
    expected.backward(upstream.double())
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    for leaf, exact in zip((x, weight, *masters), leaves, strict=True):
        assert (leaf is None) == (exact is None)
        if leaf is not None and exact is not None:
            assert leaf.grad is not None
            assert exact.grad is not None
            assert leaf.grad.dtype == leaf.dtype
            assert (leaf.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


def test_masks_do_not_depend_on_other_rows() -> None:
    """A token's result is the same, bit for bit but for its products, whoever else is in the micro-batch."""
    torch.manual_seed(0)
    weights, masters = make_weights("none"), make_masters((4, 4, 4))
    x, index, weight = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS).topk(2).indices, torch.rand(TOKENS, 2)

    def run(tokens: int) -> Tensor:
        operands = x[:tokens], index[:tokens], weight[:tokens], weights, DROPOUT, (1.0, 1.0, 1.0)
        return fused_loop(*operands, *masters)

    torch.testing.assert_close(run(TOKENS)[:5], run(5))


def test_it_keeps_what_loop_keeps_but_no_factors() -> None:
    torch.manual_seed(0)
    weights, masters, dtype, rows = make_weights("nf4"), make_masters((8, 8, 8)), torch.float16, 2 * TOKENS
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    index, weight = torch.rand(TOKENS, EXPERTS).topk(2).indices, torch.rand(TOKENS, 2).requires_grad_()
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_loop(x, index, weight, weights, DROPOUT, (1.0, 1.0, 1.0), *masters)
    parameters = {tensor.data_ptr() for tensor in masters if tensor is not None}
    kept = sum(size for place, size in storages.items() if place not in parameters)
    # Input and gate and up; their products with A; routing weights, and int64 token and row of each choice.
    in_dtype = TOKENS * HIDDEN + rows * 2 * INTERMEDIATE + rows * (8 + 8)
    assert kept == in_dtype * dtype.itemsize + 4 * rows + 2 * 8 * rows


def test_recomputation_drops_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward runs twice, as under `full`, the second time within backward and without the output."""
    output = Mock(wraps=fused._output)
    monkeypatch.setattr(fused, "_output", output)
    torch.manual_seed(2)
    weights, masters = make_weights("nf4"), make_masters((4, 2, 3))
    x, index = torch.randn(TOKENS, HIDDEN).requires_grad_(), torch.rand(TOKENS, EXPERTS).topk(2).indices
    weight, found = torch.rand(TOKENS, 2).requires_grad_(), []
    leaves = [leaf for leaf in (x, weight, *masters) if leaf is not None]

    def run(x: Tensor, weight: Tensor) -> Any:
        return fused_loop(x, index, weight, weights, DROPOUT, (1.0, 1.0, 1.0), *masters)

    for again in (False, True):
        y = checkpoint(run, x, weight, use_reentrant=False) if again else run(x, weight)
        found.append(torch.autograd.grad(y.square().sum(), leaves))
    assert output.call_count == 2
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_can_be_traced_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    def route_evenly(index: Tensor, experts: int, padded: bool) -> Routing:
        token, row, _ = route_rows_on_device(index, experts)
        return Routing(token, row, [index.numel() * expert // experts for expert in range(experts + 1)])

    monkeypatch.setattr(fused, "route_rows", route_evenly)
    gate, up, down = (NF4Weight(shape, "meta") for shape in ((8, 96, 64), (8, 96, 64), (8, 64, 96)))
    sizes = [(8, 64), (96, 8)] * 2 + [(8, 96), (64, 8)]
    masters = [torch.empty(8, *shape, device="meta", requires_grad=True) for shape in sizes]
    x = torch.empty(32, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    index, weight = torch.empty(32, 2, dtype=torch.int64, device="meta"), torch.empty(32, 2, device="meta")
    y = fused_loop(x, index, weight, (gate, up, down), DROPOUT, (1.0, 1.0, 1.0), *masters)
    y.sum().backward()
    assert x.grad is not None
    assert all(master.grad is not None and master.grad.shape == master.shape for master in masters)


def gradients(base: Path, ids: Tensor, mode: str, dropout: float, dtype: str = "float32") -> dict[str, Tensor]:
    """Loss and gradients with ranks and scales that differ between projections."""
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=dropout, use_rslora=True,
        rank_pattern={"up_proj": 8, "down_proj": 5}, alpha_pattern={"gate_proj": 3},
    )  # fmt: skip
    model = load_mixtral(base, dtype=dtype, lora=lora).train()
    draw_trained(model, 0.1, seed=3, around_start=False)
    set_activation_checkpointing(model, mode)
    torch.manual_seed(5)
    out: Any = model(input_ids=ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": out.loss.detach()} | found


def test_a_model_trains_as_with_loop(tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(tiny, ids[:, :12], "full", 0.0)
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fused")
    found = gradients(tiny, ids[:, :12], "full", 0.0)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # float32 sums in another order, through two layers.
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
def test_dropout_is_the_same_when_it_is_computed_again(
    mode: str, tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fused")
    plain, again = gradients(tiny, ids[:, :8], "none", 0.2), gradients(tiny, ids[:, :8], mode, 0.2)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_two_adapters_at_once(tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["w1", "w2", "w3"], init_lora_weights=False)
    model: Any = load_mixtral(tiny, dtype="float32", lora=lora).eval()
    other = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    expected = model(input_ids=ids[:, :6]).logits
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fused")
    torch.testing.assert_close(model(input_ids=ids[:, :6]).logits, expected, rtol=1e-4, atol=1e-5)


def test_there_are_no_copies_of_the_masters(tiny: Path) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["w1", "w2", "w3", "q_proj"])
    model: Any = load_mixtral(tiny, dtype="float32", lora=lora)
    layer = model.get_base_model().model.layers[0]
    for projection in (layer.mlp.experts.gate_proj, layer.mlp.experts.down_proj, layer.self_attn.q_proj):
        a, b = projection.weights("default")
        pair = projection.active_masters()
        assert (pair.a.data_ptr(), pair.b.data_ptr()) == (a.data_ptr(), b.data_ptr())
        assert projection.factors(torch.float32).a.data_ptr() == a.data_ptr()


def test_arguments_are_those_of_loop() -> None:
    """Factors side by side, as the other paths take them: the gradient of A comes back in one piece."""
    torch.manual_seed(1)
    weights, masters = make_weights("nf4"), make_masters((4, 2, 3))
    x, index, weight = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS).topk(2).indices, torch.rand(TOKENS, 2)
    a_gate, b_gate, a_up, b_up, a_down, b_down = (None if m is None else m.detach() for m in masters)
    assert a_gate is not None
    assert a_up is not None
    factors = [torch.cat([a_gate, a_up], 1), b_gate, b_up, a_down, b_down]
    found = []
    for path in ("loop", "fused"):
        leaves = [None if factor is None else factor.clone().requires_grad_() for factor in factors]
        PATHS[path](x, index, weight, weights, Dropout(), *leaves).sum().backward()
        found.append([leaf.grad for leaf in leaves if leaf is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
