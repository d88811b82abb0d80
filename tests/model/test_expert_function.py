"""The expert block against dense float64 autograd with W + BA written out."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.model.experts.block import ExpertBlock
from lightning_mixcn.model.experts.operands import Dropout, ExpertWeights
from lightning_mixcn.model.experts.routing import route_rows
from lightning_mixcn.model.nf4.storage import DenseWeight, NF4Weight, Weight

HIDDEN, INTERMEDIATE, RANK = 32, 48, 8
Names = tuple[str, ...]
NAMES: Names = ("x", "routing weight", "a_gate_up", "b_gate", "b_up", "a_down", "b_down")


def make_weights(experts: int, quantization: str, dtype: torch.dtype, device: str = "cpu") -> ExpertWeights:
    def weight(*shape: int) -> Weight:
        made: Weight = NF4Weight(shape) if quantization == "nf4" else DenseWeight(shape, dtype)  # type: ignore[arg-type]  # three sizes
        made.write(0, torch.randn(shape).flatten() * 0.2)
        return made.to(device)

    return ExpertWeights(
        weight(experts, INTERMEDIATE, HIDDEN),
        weight(experts, INTERMEDIATE, HIDDEN),
        weight(experts, HIDDEN, INTERMEDIATE),
    )


def make_inputs(tokens: int, experts: int, top_k: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    shapes = [
        (tokens, HIDDEN), (tokens, top_k), (experts, 2 * RANK, HIDDEN), (experts, INTERMEDIATE, RANK),
        (experts, INTERMEDIATE, RANK), (experts, RANK, INTERMEDIATE), (experts, HIDDEN, RANK),
    ]  # fmt: skip
    inputs = [torch.randn(shape) * (1.0 if number == 0 else 0.3) for number, shape in enumerate(shapes)]
    inputs[1] = inputs[1].softmax(dim=1)
    dtypes = [dtype, torch.float32, *[dtype] * 5]
    return [value.to(device, dtype).requires_grad_() for value, dtype in zip(inputs, dtypes, strict=True)]


def reference(
    inputs: list[Tensor], index: Tensor, weights: ExpertWeights, dropout: Dropout, padded: bool = False
) -> Tensor:
    """Σₖ weight·down(silu(gate x)·up x), one dense expert at a time, in the dtype of the inputs."""
    x, routing, a_gate_up, b_gate, b_up, a_down, b_down = inputs
    dtype, y = x.dtype, torch.zeros_like(x)
    routed = {
        expert: slice(rows.start, rows.stop) for expert, rows in route_rows(index, len(a_gate_up), padded).experts()
    }
    mask_x = dropout.mask(x.shape, 0, x)
    for expert, rows in routed.items():
        token, choice = torch.where(index == expert)
        dropped = x[token] if mask_x is None else x[token] * mask_x[token]
        a_gate, a_up = a_gate_up[expert].split(RANK)
        gate = (
            x[token] @ weights.gate.decoder(torch.float32)(expert).to(dtype).t()
            + dropped @ (b_gate[expert] @ a_gate).t()
        )
        up = x[token] @ weights.up.decoder(torch.float32)(expert).to(dtype).t() + dropped @ (b_up[expert] @ a_up).t()
        h = F.silu(gate) * up
        mask_h = dropout.mask((rows.stop - rows.start, INTERMEDIATE), 1 + expert, h)
        h_dropped = h if mask_h is None else h * mask_h[: len(token)]
        down = weights.down.decoder(torch.float32)(expert).to(dtype)
        out = h @ down.t() + h_dropped @ (b_down[expert] @ a_down[expert]).t()
        y = y.index_add(0, token, routing[token, choice, None] * out)
    return y


def chosen(kind: str, tokens: int, experts: int, top_k: int) -> Tensor:
    if kind == "one expert":
        return torch.zeros(tokens, 1, dtype=torch.int64)
    if kind == "empty experts":
        return torch.rand(tokens, experts - 2).topk(top_k).indices
    return torch.rand(tokens, experts).topk(top_k).indices


CASES = [
    ("random", 50, 4, 2), ("random", 33, 8, 8), ("random", 20, 4, 1), ("one token", 1, 4, 4),
    ("empty experts", 40, 6, 2), ("one expert", 37, 4, 1),
]  # fmt: skip


# Norm of the error over the norm of the truth: a few units in the last place (2⁻²⁴, 2⁻⁹) for a chain of products.
FLOAT32, BFLOAT16 = (torch.float32, 1e-5), (torch.bfloat16, 2e-2)
# `grouped` decodes to 16 bits or not as `loop` does; `decode` meets dense weights never, and Triton's interpreter
# multiplies bfloat16 as integers.
RUNS = [
    ("loop", "none", FLOAT32), ("loop", "none", BFLOAT16), ("loop", "nf4", FLOAT32), ("loop", "nf4", BFLOAT16),
    ("grouped", "none", FLOAT32), ("grouped", "none", BFLOAT16), ("grouped", "nf4", BFLOAT16),
    ("decode", "nf4", FLOAT32),
]  # fmt: skip


def check(
    case: tuple[str, int, int, int],
    quantization: str,
    precision: tuple[torch.dtype, float],
    probability: float,
    device: str,
    padded: bool = False,
) -> None:
    """The block's result and gradients, on the path that the environment names, against `reference` in float64."""
    (kind, tokens, experts, top_k), (dtype, tolerance) = case, precision
    torch.manual_seed(tokens)
    weights = make_weights(experts, quantization, dtype, device)
    inputs = make_inputs(tokens, experts, top_k, dtype, device)
    index, dropout = chosen(kind, tokens, experts, top_k).to(device), Dropout(probability, seed=7)
    upstream = torch.randn(tokens, HIDDEN).to(device, dtype)
    y = ExpertBlock.apply(inputs[0], index, inputs[1], weights, dropout, *inputs[2:])
    y.backward(upstream)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = reference(exact, index, weights, dropout, padded)
    expected.backward(upstream.double())
    assert relative_error(y, expected) <= tolerance, "output"
    for name, value, truth in zip(NAMES, inputs, exact, strict=True):
        assert value.grad is not None
        assert truth.grad is not None
        assert relative_error(value.grad, truth.grad) <= tolerance, name


@pytest.mark.parametrize(("path", "quantization", "precision"), RUNS)
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_dense_float64(
    case: tuple[str, int, int, int],
    precision: tuple[torch.dtype, float],
    probability: float,
    quantization: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if path == "decode":
        pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton's interpreter is off; on a GPU, test_gradients_on_a_gpu has this path")
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    check(case, quantization, precision, probability, "cpu", path == "loop" and precision == BFLOAT16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["loop", "grouped", "decode"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_on_a_gpu(
    case: tuple[str, int, int, int], probability: float, quantization: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    check(case, quantization, BFLOAT16, probability, "cuda")


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-12))


@pytest.mark.parametrize("path", ["loop", "grouped"])
def test_a_projection_without_adapter(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    torch.manual_seed(0)
    weights, inputs = make_weights(4, "none", torch.float32), make_inputs(9, 4, 2, torch.float32)
    index = chosen("random", 9, 4, 2)
    a_up = inputs[2].detach()[:, RANK:].clone().requires_grad_()
    y = ExpertBlock.apply(inputs[0], index, inputs[1], weights, Dropout(), a_up, None, inputs[4], None, None)
    y.sum().backward()
    with torch.no_grad():
        padded = [inputs[0], inputs[1], torch.cat([torch.zeros_like(a_up), a_up], 1)]
        padded += [torch.zeros_like(inputs[3]), inputs[4], torch.zeros_like(inputs[5]), torch.zeros_like(inputs[6])]
        torch.testing.assert_close(y, reference(padded, index, weights, Dropout()))
    assert a_up.grad is not None


@pytest.mark.parametrize("path", ["loop", "grouped"])
def test_an_input_that_needs_no_gradient(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    torch.manual_seed(0)
    weights, inputs = make_weights(4, "nf4", torch.float32), make_inputs(9, 4, 2, torch.float32)
    index = chosen("random", 9, 4, 2)
    with_dx, without = (
        torch.autograd.grad(
            ExpertBlock.apply(x, index, inputs[1], weights, Dropout(0.3, 5), *inputs[2:]).sum(), inputs[1:]
        )
        for x in (inputs[0], inputs[0].detach())
    )
    assert all(torch.equal(one, other) for one, other in zip(with_dx, without, strict=True))
