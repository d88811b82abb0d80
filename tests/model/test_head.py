"""Chunked loss against torch's cross-entropy."""

import os

import pytest
import torch
import torch.nn.functional as F

from lightning_mixcn.model import head as head_module
from lightning_mixcn.model.head import Embedding, Head


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [2**25, 1])
def test_nll_and_gradients_equal_cross_entropy(
    trained: bool, chunk: int, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: set TRITON_INTERPRET=1")
    monkeypatch.setattr(head_module, "_runs_triton", lambda _: triton)
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


def test_the_chunks_of_both_devices_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 and 512 rows of a vocabulary that wide, so four chunks and one."""
    torch.manual_seed(0)
    head = Head(4, 2**17, bias=False).requires_grad_()
    hidden, labels = torch.randn(1, 210, 4), torch.randint(0, 2**17, (1, 210))
    results = []
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(head_module._CHUNK_LOGITS, "cpu", head_module._CHUNK_LOGITS[device])
        given = hidden.clone().requires_grad_()
        nll = head(given, labels)
        head.weight.grad = None
        nll.sum().backward()
        results.append([nll.detach(), given.grad, head.weight.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("vocabulary", [32_000, 55_296])
@pytest.mark.parametrize("trained", [False, True])
def test_the_loss_on_a_gpu(vocabulary: int, trained: bool, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where whatever the host would have to wait for is an error, and which holds no memory."""
    if triton:
        pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    monkeypatch.setattr(head_module, "_runs_triton", lambda _: triton)
    monkeypatch.setitem(head_module._CHUNK_LOGITS, "meta", head_module._CHUNK_LOGITS["cuda"])
    head = Head(4096, vocabulary, bias=False, device="meta", dtype=torch.bfloat16).requires_grad_(trained)
    hidden = torch.empty(1, 32_768, 4096, device="meta", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.empty(1, 32_768, device="meta", dtype=torch.int64)
    head(hidden, labels).sum().backward()
    assert hidden.grad is not None
    assert (head.weight.grad is not None) == trained
    chunks = head_module._Chunks(hidden[0], head.weight, labels[0])
    assert len(chunks.rows) <= 32
    assert sum(len(range(32_768)[rows]) for rows in chunks.rows) == 32_768
    held = {buffer.untyped_storage()._cdata: buffer.nbytes for buffer in (chunks.product_CV, chunks.logits_CV)}
    assert sum(held.values()) <= (128 if triton else 384) * 2**20


@pytest.mark.gpu
def test_the_loss_on_a_gpu_waits_for_nothing_and_holds_its_bound() -> None:
    head = Head(512, 32_000, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(1, 8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 32_000, (1, 8192), device="cuda")
    head(hidden, labels).sum().backward()  # the first call loads libraries, which waits
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(hidden, labels).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The chunk's buffers, the kept gradient and the one that it is scaled to, and a tenth for what is small.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * (128 * 2**20 + 3 * hidden.nbytes)


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
