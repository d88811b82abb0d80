"""Attention's projections with LoRA inside: against layers written out in float64, and where they cannot be fused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

from lightning_mixcn import build_mixtral
from lightning_mixcn.model import load_mixtral, set_activation_checkpointing
from lightning_mixcn.model.architectures import MODEL_TYPES
from lightning_mixcn.model.attention import documents as attention
from lightning_mixcn.model.attention import fused, projections
from lightning_mixcn.model.attention import packed as packed_attention
from lightning_mixcn.model.attention.projections import can_fuse, project_output, project_states
from lightning_mixcn.model.lora.attach import LoraFrozenLinear
from lightning_mixcn.model.nf4.linear import FrozenLinear
from lightning_mixcn.testing import save_tiny_model, tiny_mixtral_config
from tests.model.attention.varlen import dense_varlen
from tests.model.philox import dropout_mask
from tests.model.trained_values import draw_trained

ROWS, LENGTH = 2, 7


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    if request.node.get_closest_marker("gpu") is None and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off; on a GPU, test_gradients_on_a_gpu has this path")


def make_layer(inputs: int, outputs: int, rank: int, alpha: float, dropout: float) -> Any:
    linear = FrozenLinear(inputs, outputs, quantization="nf4", dtype=torch.float32)
    linear.storage.write(0, torch.randn(inputs * outputs) * 0.2)
    if rank == 0:
        return linear
    config = peft.LoraConfig(lora_dropout=dropout)
    layer = LoraFrozenLinear(linear, "default", config, rank, alpha)  # type: ignore[arg-type]  # any number
    with torch.no_grad():
        for weight in layer.weights("default"):
            weight.copy_(torch.randn(weight.shape) * 0.3)
    return layer.train()


def masters_of(layer: Any) -> list[Tensor]:
    return list(layer.weights("default")) if isinstance(layer, LoraFrozenLinear) else []


def exact(layer: Any, x: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """W x + (α/r) B A dropout(x) in float64, and the leaves A and B."""
    weight = layer.storage.flat(dtype).view(layer.storage.shape[1:]).double()
    y = x @ weight.t()
    leaves = [master.detach().double().requires_grad_() for master in masters_of(layer)]
    if leaves:
        y = y + layer.scaling["default"] * ((x * mask) @ leaves[0].t() @ leaves[1].t())
    return y, leaves


def check(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert (one.double() - other).norm() <= tolerance * other.norm()


# Ranks of q, k, v and o (0: no adapter), heads, key-value heads, their size, the width of what is projected.
SIZES = [
    ((8, 8, 8, 8), (4, 2, 8), 32), ((3, 5, 2, 1), (3, 1, 6), 50), ((0, 4, 0, 0), (2, 2, 4), 10),
    ((0, 0, 0, 3), (1, 1, 2), 4),
]  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("ranks", "sizes", "width"), SIZES)
def test_states(
    ranks: tuple[int, ...], sizes: tuple[int, int, int], width: int, dtype: torch.dtype, tolerance: float,
    dropout: float,
) -> None:  # fmt: skip
    torch.manual_seed(width)
    heads, key_heads, size = sizes
    layers = [
        make_layer(width, count * size, rank, alpha, dropout)
        for count, rank, alpha in zip((heads, key_heads, key_heads), ranks[:3], (6, 3, 5), strict=True)
    ]
    angle = torch.rand(ROWS, LENGTH, size // 2).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = torch.randn(ROWS, LENGTH, width).to(dtype).requires_grad_()
    torch.manual_seed(4)
    states = project_states(x, (cos, sin), size, layers)
    upstream = [torch.randn(state.shape).to(dtype) for state in states]
    torch.autograd.backward(states, upstream)
    torch.manual_seed(4)
    seed = int(torch.randint(2**31, ())) if dropout and any(ranks[:3]) else 0
    mask = dropout_mask(torch.arange(ROWS * LENGTH), width, dropout, seed, 0).view(ROWS, LENGTH, width)
    truth = x.detach().double().requires_grad_()
    results = [exact(layer, truth, mask, dtype) for layer in layers]
    query, key, value = (y.unflatten(2, (-1, size)) for y, _ in results)
    query, key = apply_rotary_pos_emb(query, key, cos.double(), sin.double(), unsqueeze_dim=2)
    torch.autograd.backward([query, key, value], [grad.double() for grad in upstream])
    check(list(states), [query, key, value], tolerance)
    leaves = [leaf for _, leaves in results for leaf in leaves]
    masters = [master for layer in layers for master in masters_of(layer)]
    check([x.grad, *(m.grad for m in masters)], [truth.grad, *(leaf.grad for leaf in leaves)], tolerance)
    assert all(master.grad is not None and master.grad.dtype == torch.float32 for master in masters)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(8, 32, 16), (3, 18, 50), (0, 4, 6)])
def test_output(rank: int, inputs: int, outputs: int, dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    torch.manual_seed(inputs)
    layer = make_layer(inputs, outputs, rank, 7, dropout)
    x = torch.randn(ROWS, LENGTH, inputs).to(dtype).requires_grad_()
    upstream = torch.randn(ROWS, LENGTH, outputs).to(dtype)
    torch.manual_seed(4)
    y = project_output(x, layer)
    y.backward(upstream)
    torch.manual_seed(4)
    seed = int(torch.randint(2**31, ())) if dropout and rank else 0
    mask = dropout_mask(torch.arange(ROWS * LENGTH), inputs, dropout, seed, 0).view(ROWS, LENGTH, inputs)
    truth = x.detach().double().requires_grad_()
    expected, leaves = exact(layer, truth, mask, dtype)
    expected.backward(upstream.double())
    found = [y, x.grad, *(master.grad for master in masters_of(layer))]
    check(found, [expected, truth.grad, *(leaf.grad for leaf in leaves)], tolerance)


def test_an_input_that_needs_no_gradient() -> None:
    """As the first layer's, under a frozen embedding."""
    torch.manual_seed(0)
    layer, x = make_layer(8, 6, 2, 4, 0.0), torch.randn(1, 3, 8)
    project_output(x, layer).sum().backward()
    expected, leaves = exact(layer, x.double(), torch.ones(1, 3, 8), torch.float32)
    expected.sum().backward()
    check([master.grad for master in masters_of(layer)], [leaf.grad for leaf in leaves], 2e-6)
    with torch.no_grad():
        assert not project_output(x, layer).requires_grad


def test_what_cannot_be_fused() -> None:
    """Dense weights need no decoding; two codes of a byte are of one row where rows are even."""

    def layers(width: int, quantization: str) -> list[FrozenLinear]:
        sizes: dict[str, Any] = {"quantization": "nf4", "dtype": torch.float32, "device": "meta"}
        return [FrozenLinear(8, 6, **sizes), FrozenLinear(width, 6, **(sizes | {"quantization": quantization}))]

    assert can_fuse(layers(8, "nf4"))
    assert not can_fuse(layers(7, "nf4"))
    assert not can_fuse(layers(8, "none"))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the CPU take CUDA's way through attention."""

    def use() -> None:
        monkeypatch.setattr(attention, "serves", lambda *_: True)
        monkeypatch.setattr(packed_attention, "varlen_attn", dense_varlen)
        monkeypatch.setattr(fused, "_runs_triton", lambda _: True)

    return use


def gradients(base: Path, ids: Tensor, mode: str, dropout: float) -> dict[str, Tensor]:
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate"], lora_dropout=dropout,
        use_rslora=True, rank_pattern={"k_proj": 3, "o_proj": 5},
    )  # fmt: skip
    model = load_mixtral(base, dtype="float32", lora=lora).train()
    draw_trained(model, 0.1, seed=3, around_start=False)
    set_activation_checkpointing(model, mode)
    torch.manual_seed(5)
    out: Any = model(input_ids=ids, labels=ids)
    out.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": out.loss.detach()} | found


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_model_trains_as_without(family: str, tmp_path: Path, ids: Tensor, on_cpu: Callable[[], None]) -> None:
    base = save_tiny_model(tmp_path, family)
    expected = gradients(base, ids[:, :12], "none", 0.0)
    on_cpu()
    found = gradients(base, ids[:, :12], "none", 0.0)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # float32 sums in another order, through two layers.
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@torch.no_grad()
def test_states_are_clipped_here_too(tmp_path: Path, ids: Tensor, on_cpu: Callable[[], None]) -> None:
    model: Any = load_mixtral(save_tiny_model(tmp_path, "olmoe", clip_qkv=0.1), dtype="float32")
    expected = model(input_ids=ids, labels=ids).nll
    on_cpu()
    torch.testing.assert_close(model(input_ids=ids, labels=ids).nll, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "outputs"), [("selective", 2), ("full", 4)])
def test_dropout_is_the_same_when_it_is_computed_again(
    mode: str, outputs: int, tiny: Path, ids: Tensor, on_cpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the output projection's product is not, where attention alone is: of two layers."""
    on_cpu()
    plain = gradients(tiny, ids[:, :8], "none", 0.2)
    output = Mock(wraps=projections._output)
    monkeypatch.setattr(projections, "_output", output)
    again = gradients(tiny, ids[:, :8], mode, 0.2)
    assert output.call_count == outputs
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_what_is_dropped_is_drawn_anew(tiny: Path, ids: Tensor, on_cpu: Callable[[], None]) -> None:
    """For each micro-batch, and for the output's projection."""
    on_cpu()
    layer: Any = load_mixtral(
        tiny, dtype="float32", lora=peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "o_proj"])
    ).train()
    attention_layer = layer.get_base_model().model.layers[0].self_attn
    seeds = [
        projections.Projections.of([projection])[0].drop.seed
        for projection in (attention_layer.q_proj, attention_layer.o_proj) * 2
    ]
    assert len(set(seeds)) == 4
    layer.eval()
    assert projections.Projections.of([attention_layer.q_proj])[0].drop.threshold == 0


def test_two_adapters_at_once(tiny: Path, ids: Tensor, on_cpu: Callable[[], None]) -> None:
    targets = ["q_proj", "v_proj", "o_proj"]
    model: Any = load_mixtral(
        tiny, dtype="float32", lora=peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    ).eval()
    other = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    expected = model(input_ids=ids[:, :6], labels=ids[:, :6]).nll
    with model.disable_adapter():
        plain = model(input_ids=ids[:, :6], labels=ids[:, :6]).nll
    on_cpu()
    torch.testing.assert_close(model(input_ids=ids[:, :6], labels=ids[:, :6]).nll, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids[:, :6], labels=ids[:, :6]).nll, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_gradients_on_a_gpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the layers one by one, at the widths of Mixtral-8x7B."""
    lora = peft.LoraConfig(r=64, lora_alpha=128, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = tiny_mixtral_config(**sizes, intermediate_size=64, num_hidden_layers=1)
    model: Any = build_mixtral(config, lora=lora, device="cuda").train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.02)
    set_activation_checkpointing(model, mode)
    ids, found = torch.randint(3, 200, (2, 100), device="cuda"), []
    for fuses in (True, False):
        monkeypatch.setattr(fused, "can_fuse", lambda projections, fuses=fuses: fuses and can_fuse(projections))
        loss = model(input_ids=ids, labels=ids, position_ids=torch.arange(100, device="cuda").expand_as(ids)).loss
        found.append(torch.autograd.grad(loss, list(trained.values())))
    for name, one, other in zip(trained, *found, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm(), name  # bfloat16, in another order


def test_torch_attends_to_columns_of_a_wider_matrix() -> None:
    """On the meta device, which computes shapes; gradients come back in the shapes of the states."""
    model: Any = build_mixtral(
        tiny_mixtral_config(), device="meta", lora=peft.LoraConfig(r=4, target_modules="all-linear")
    ).train()
    layer = model.get_base_model().model.layers[0].self_attn
    x = torch.empty(2, 40, layer.q_proj.in_features, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angle = torch.empty(1, 40, layer.head_dim, dtype=torch.bfloat16, device="meta")
    inputs = [layer.q_proj, layer.k_proj, layer.v_proj]
    query, key, value = (state.transpose(1, 2) for state in project_states(x, (angle, angle), layer.head_dim, inputs))
    offsets = packed_attention.PackedDocuments(torch.empty(3, dtype=torch.int32, device="meta"), 40)
    attended = packed_attention.packed_attention(query, key, value, offsets).flatten(2)
    project_output(attended, layer.o_proj).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
