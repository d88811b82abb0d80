"""The expert block of every path against one expert in float64, at the widths of Mixtral-8x7B on a GPU.

One expert gets all rows: 1, as many as a tile of the kernels holds, one more, and many. Small sizes run on the CPU.
"""

import os
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.model.experts.loop import Dropout
from lightning_mixcn.model.experts.path import PATHS
from lightning_mixcn.model.nf4.storage import NF4Weight

EXPERTS, CHOSEN, RANK = 2, 1, 16
NAMES = ("x", "routing weight", "a_gate_up", "b_gate", "b_up", "a_down", "b_down")


class Sizes(NamedTuple):
    device: str
    dtype: torch.dtype
    hidden: int
    intermediate: int
    # Norm of the error over the norm of the truth: a few units in the last place for a chain of products.
    tolerance: float


SMALL = Sizes("cpu", torch.float32, 64, 192, 1e-5)
MIXTRAL = Sizes("cuda", torch.bfloat16, 4096, 14336, 2e-2)


def on_device(sizes: Sizes, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=sizes.device) * scale


def weight_of(sizes: Sizes, rows: int, columns: int) -> NF4Weight:
    weight = NF4Weight((EXPERTS, rows, columns), sizes.device)
    weight.write(0, on_device(sizes, EXPERTS, rows, columns, scale=columns**-0.5).flatten())
    return weight


def inputs_of(sizes: Sizes, rows: int) -> list[Tensor]:
    hidden, inner = sizes.hidden, sizes.intermediate
    factors = [(2 * RANK, hidden), (inner, RANK), (inner, RANK), (RANK, inner), (hidden, RANK)]
    inputs = [on_device(sizes, rows, hidden), torch.rand(rows, 1, device=sizes.device) + 0.5]
    inputs += [on_device(sizes, EXPERTS, *shape, scale=shape[1] ** -0.5) for shape in factors]
    dtypes = [sizes.dtype, torch.float32, *[sizes.dtype] * 5]
    return [value.to(dtype).requires_grad_() for value, dtype in zip(inputs, dtypes, strict=True)]


def one_expert(inputs: list[Tensor], weights: tuple[NF4Weight, ...], dtype: torch.dtype) -> Tensor:
    """Compute the expert with W + BA written out, W as it is decoded for the products."""
    x, routing, *factors = inputs
    a_gate_up, b_gate, b_up, a_down, b_down = (factor[CHOSEN] for factor in factors)
    a_gate, a_up = a_gate_up.split(RANK)
    gate, up, down = (weight.decoder(dtype)(CHOSEN).double() for weight in weights)
    h = F.silu(x @ (gate + b_gate @ a_gate).t()) * (x @ (up + b_up @ a_up).t())
    y: Tensor = routing * (h @ (down + b_down @ a_down).t())
    return y


@pytest.mark.parametrize(
    "sizes", [pytest.param(SMALL, id="small"), pytest.param(MIXTRAL, id="8x7b", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 64, 65, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_path_equals_one_expert(path: str, rows: int, sizes: Sizes) -> None:
    skip_what_cannot_run(path, sizes.device)
    torch.manual_seed(rows)
    hidden, inner = sizes.hidden, sizes.intermediate
    weights = weight_of(sizes, inner, hidden), weight_of(sizes, inner, hidden), weight_of(sizes, hidden, inner)
    inputs, upstream = inputs_of(sizes, rows), on_device(sizes, rows, hidden).to(sizes.dtype)
    index = torch.full((rows, 1), CHOSEN, device=sizes.device)
    y = PATHS[path](inputs[0], index, inputs[1], weights, Dropout(), *inputs[2:])
    y.backward(upstream)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = one_expert(exact, weights, sizes.dtype)
    expected.backward(upstream.double())
    assert error(y, expected) <= sizes.tolerance, "output"
    for name, value, truth in zip(NAMES, inputs, exact, strict=True):
        assert error(value.grad, truth.grad) <= sizes.tolerance, name
    assert all(not value.grad[1 - CHOSEN].any() for value in inputs[2:] if value.grad is not None), (
        "no rows, no gradient"
    )


def error(value: Any, truth: Any) -> float:
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-12))


def skip_what_cannot_run(path: str, device: str) -> None:
    if path in ("fused", "decode"):
        pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton's interpreter is off")
    if (
        path in ("grouped", "decode")
        and device == "cuda"
        and torch.cuda.get_device_capability() not in ((9, 0), (10, 0))
    ):
        pytest.skip("torch's grouped product is a loop on this GPU")
