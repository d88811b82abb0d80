"""That no step of the grouped path asks a device for a number."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_mixcn.model.experts.block import ExpertBlock
from lightning_mixcn.model.experts.operands import Dropout, ExpertWeights
from lightning_mixcn.model.nf4 import codec as nf4
from lightning_mixcn.model.nf4.storage import NF4Weight


def train_on_nothing() -> None:
    """Forward and backward with tensors that have shapes and no values: reading one is an error."""
    nf4.dynamic_code(torch.device("cpu"))  # kept from here on: it must be a real one
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = ExpertWeights(NF4Weight((4, 48, 32)), NF4Weight((4, 48, 32)), NF4Weight((4, 32, 48)))
        shapes = [(4, 16, 32), (4, 48, 8), (4, 48, 8), (4, 8, 48), (4, 32, 8)]
        factors = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        x, weight = torch.empty(9, 32, dtype=torch.bfloat16, requires_grad=True), torch.empty(9, 2, requires_grad=True)
        index = torch.empty(9, 2, dtype=torch.int64)
        y = ExpertBlock.apply(x, index, weight, weights, Dropout(), *factors)
        y.backward(torch.empty_like(y))
        assert [None if t.grad is None else t.grad.shape for t in (x, weight, *factors)] == [
            t.shape for t in (x, weight, *factors)
        ]


def test_no_value_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "loop")
    with pytest.raises(DataDependentOutputException):
        train_on_nothing()  # the loop must know how many rows an expert has
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    train_on_nothing()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["grouped", "decode"])
def test_the_host_never_waits_for_the_gpu(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "grouped" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product is a loop on this GPU")
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    weights = ExpertWeights(*(NF4Weight(shape, "cuda") for shape in ((4, 48, 32), (4, 48, 32), (4, 32, 48))))
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
            ExpertBlock.apply(x, index, routing, weights, Dropout(), *factors, None, None).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
