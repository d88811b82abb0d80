"""Torch's fused norm against transformers' own, and where each is used."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.causal_lm import FusedRMSNorm


def given(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Rows of very different sizes, one of zeros; a weight; a gradient."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 48, generator=generator) * torch.logspace(-4, 3, 64)[:, None]
    rows[5] = 0
    weight, grad = torch.rand(48, generator=generator) + 0.5, torch.randn(64, 48, generator=generator)
    return rows.to(device, dtype), weight.to(device, dtype), grad.to(device, dtype)


def run(function: Any, rows: Tensor, grad: Tensor) -> list[Tensor]:
    rows = rows.clone().requires_grad_()
    result = function(rows)
    result.backward(grad)
    assert rows.grad is not None
    return [result.detach(), rows.grad]


def stock(weight: Tensor) -> MixtralRMSNorm:
    norm = MixtralRMSNorm(len(weight), 1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cpu_computes_what_transformers_does(dtype: torch.dtype) -> None:
    rows, weight, grad = given(dtype)
    norm = FusedRMSNorm(48, 1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert all(map(torch.equal, run(norm, rows, grad), run(stock(weight), rows, grad)))


def test_the_function_that_is_used_on_cuda() -> None:
    """In float64 on the CPU torch's function is transformers' norm, whose own float32 is the tolerance."""
    rows, weight, grad = given(torch.float64)
    found = run(lambda x: F.rms_norm(x, weight.shape, weight, 1e-5), rows, grad)
    expected = run(stock(weight), rows, grad)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_cuda_takes_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    norm, on_cuda = FusedRMSNorm(48, 1e-5), type("OnCuda", (), {"is_cuda": True})()
    monkeypatch.setattr(F, "rms_norm", lambda *arguments: calls.append(arguments))
    for version in ("13.0", None):
        monkeypatch.setattr(torch.version, "cuda", version)
        if version:
            norm(on_cuda)
    assert calls == [(on_cuda, torch.Size([48]), norm.weight, 1e-5)]


def test_every_norm_of_a_model_is_one_of_the_compute_dtype(tiny: Path) -> None:
    model: Any = load_mixtral(tiny)
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    assert {(type(norm), norm.weight.dtype, norm.weight.requires_grad) for norm in norms} == {
        (FusedRMSNorm, torch.bfloat16, False)
    }
    assert len(norms) == 2 * model.config.num_hidden_layers + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_fused_kernel(dtype: torch.dtype) -> None:
    """As near to float64 as transformers' norm, up to a rounding of the compute dtype."""
    rows, weight, grad = given(dtype, "cuda")
    norm = FusedRMSNorm(48, 1e-5).cuda()
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    exact = run(lambda x: F.rms_norm(x, weight.shape, weight.double(), 1e-5), rows.double(), grad.double())
    fused, stepwise = run(norm, rows, grad), run(stock(weight), rows, grad)
    assert "FusedRmsNorm" in str(norm(rows.clone().requires_grad_()).grad_fn)
    for one, two, true in zip(fused, stepwise, exact, strict=True):
        unit = torch.finfo(dtype).eps * true.norm()
        assert (one.double() - true).norm() <= (two.double() - true).norm() + unit
