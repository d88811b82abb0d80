"""Chunked loss against torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from lightning_mixcn.model import head as head_module
from lightning_mixcn.model.head import Embedding, Head


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [2**25, 1])
def test_nll_and_gradients_equal_cross_entropy(trained: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module._CHUNK_LOGITS, "cpu", chunk)
    torch.manual_seed(0)
    head = Head(16, 50, bias=False).requires_grad_(trained)
    hidden, labels = torch.randn(3, 70, 16, requires_grad=True), torch.randint(0, 50, (3, 70))
    labels[0, 10:30] = labels[2, 0] = labels[1, -1] = -100
    upstream = torch.rand(3, 70)
    nll = head(hidden, labels)
    (nll * upstream).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    logits = F.linear(exact, weight)[:, :-1].transpose(1, 2)
    expected = F.pad(F.cross_entropy(logits, labels[:, 1:], reduction="none"), (1, 0))
    (expected * upstream).sum().backward()
    torch.testing.assert_close(nll.double(), expected, atol=1e-5, rtol=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)
    if trained:
        assert head.weight.grad is not None
        torch.testing.assert_close(head.weight.grad.double(), weight.grad, atol=1e-5, rtol=1e-4)


def test_masters_stay_float32_and_compute_is_bfloat16() -> None:
    head, embedding = Head(16, 50, bias=False), Embedding(50, 16)
    embedding.output_dtype = torch.bfloat16
    hidden = embedding(torch.arange(6)[None])
    assert hidden.dtype == torch.bfloat16
    assert head(hidden).dtype == torch.bfloat16
    nll = head(hidden, torch.arange(6)[None])
    nll.sum().backward()
    assert nll.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == embedding.weight.dtype == torch.float32


def test_large_logits_stay_finite() -> None:
    head = Head(4, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4] * 4, [-1e4] * 4, [0.0] * 4]))
    nll = head(torch.ones(1, 3, 4), torch.tensor([[0, 1, 0]]))
    assert nll.tolist() == [[0.0, 80000.0, 0.0]]
