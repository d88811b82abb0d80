"""That no step of the grouped path asks a device for a number."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import grouped_mm

from lightning_mixcn.model.experts.grouped import (
    decoding_product,
    outer_product,
    stack_product,
    swiglu,
    swiglu_backward,
)
from lightning_mixcn.model.experts.loop import Dropout
from lightning_mixcn.model.experts.path import PATHS
from lightning_mixcn.model.nf4 import codec as nf4
from lightning_mixcn.model.nf4.storage import DenseWeight, NF4Weight, Weight


def train_on_nothing(path: str) -> None:
    """Forward and backward with tensors that have shapes and no values: reading one is an error."""
    nf4.dynamic_code(torch.device("cpu"))  # kept from here on: it must be a real one
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = NF4Weight((4, 48, 32)), NF4Weight((4, 48, 32)), NF4Weight((4, 32, 48))
        shapes = [(4, 16, 32), (4, 48, 8), (4, 48, 8), (4, 8, 48), (4, 32, 8)]
        factors = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        x, weight = torch.empty(9, 32, dtype=torch.bfloat16, requires_grad=True), torch.empty(9, 2, requires_grad=True)
        index = torch.empty(9, 2, dtype=torch.int64)
        y = PATHS[path](x, index, weight, weights, Dropout(), *factors)
        y.backward(torch.empty_like(y))
        assert [None if t.grad is None else t.grad.shape for t in (x, weight, *factors)] == [
            t.shape for t in (x, weight, *factors)
        ]


def test_no_value_is_read() -> None:
    with pytest.raises(DataDependentOutputException):
        train_on_nothing("loop")  # the loop must know how many rows an expert has
    train_on_nothing("grouped")


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["grouped", "decode"])
def test_the_host_never_waits_for_the_gpu(path: str) -> None:
    if path == "grouped" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product is a loop on this GPU")
    weights = tuple(NF4Weight(shape, "cuda") for shape in ((4, 48, 32), (4, 48, 32), (4, 32, 48)))
    for weight in weights:
        weight.write(0, torch.randn(4 * 48 * 32))
    x = torch.randn(9, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index = torch.rand(9, 4, device="cuda").topk(2).indices
    routing = torch.rand(9, 2, device="cuda", requires_grad=True)
    factors = [torch.randn(4, 16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)]
    factors += [torch.randn(4, 48, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    for mode in ("default", "error"):  # the first round compiles the kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            PATHS[path](x, index, routing, weights, Dropout(), *factors, None, None).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


COUNTS = [0, 5, 0, 9, 0]


@pytest.fixture
def ends() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_frozen_matrices(quantization: str, transposed: bool, ends: Tensor) -> None:
    shape = (len(COUNTS), 24, 40)
    weight: Weight = NF4Weight(shape) if quantization == "nf4" else DenseWeight(shape, torch.bfloat16)
    weight.write(0, torch.randn(shape).flatten())
    rows = torch.randn(sum(COUNTS), 40 if transposed else 24).bfloat16()
    decode = weight.decoder(torch.bfloat16)
    matrices = [decode(expert).double() for expert in range(len(COUNTS))]
    parts = zip(rows.double().split(COUNTS), matrices, strict=True)
    expected = torch.cat([part @ (matrix.t() if transposed else matrix) for part, matrix in parts])
    # One rounding to bfloat16, at most half a unit in the last place.
    product = stack_product(rows, weight, ends, transposed)
    torch.testing.assert_close(product.double(), expected, rtol=2**-8, atol=1e-6)
    if quantization == "none":
        assert torch.equal(decoding_product(rows, weight, ends, transposed), product)


def test_factors(ends: Tensor) -> None:
    rows, factor = torch.randn(sum(COUNTS), 16), torch.randn(len(COUNTS), 16, 8)
    expected = torch.cat([part @ matrix for part, matrix in zip(rows.split(COUNTS), factor, strict=True)])
    torch.testing.assert_close(grouped_mm(rows, factor, offs=ends), expected)
    transposed = factor.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(grouped_mm(rows, transposed, offs=ends), expected)


def test_an_expert_without_rows_has_no_gradient(ends: Tensor) -> None:
    left, right = torch.randn(sum(COUNTS), 16), torch.randn(sum(COUNTS), 8)
    result = outer_product(left, right, ends)
    for expert, (one, other) in enumerate(zip(left.split(COUNTS), right.split(COUNTS), strict=True)):
        torch.testing.assert_close(result[expert], one.t() @ other)
        assert COUNTS[expert] or not result[expert].any()


def test_equals_autograd() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(7, 40, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, dh = torch.rand(7, dtype=torch.float64, requires_grad=True), torch.randn(7, 40, dtype=torch.float64)
    h = F.silu(gate) * up
    (h * weight[:, None]).backward(dh)
    with torch.no_grad():
        torch.testing.assert_close(swiglu(gate, up), h)
        found_h, dgate, dup, dweight = swiglu_backward(gate, up, dh.clone(), weight)
    torch.testing.assert_close(found_h, h)
    torch.testing.assert_close(dgate, gate.grad)
    torch.testing.assert_close(dup, up.grad)
    assert weight.grad is not None
    torch.testing.assert_close(dweight, weight.grad.float())
