"""Copies to the host and back; whose host that is, needs a GPU (see `test_activation_checkpointing` for the rest)."""

import pytest
import torch

from lightning_mixcn.model.memory.checkpointing import HostCopy, kept_on_host


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_comes_back_as_it_was() -> None:
    """The tensor is overwritten right after, as its memory would be."""
    for _ in range(20):
        tensor = torch.randn(4096, 1024, device="cuda")
        expected, copy = tensor.clone(), HostCopy(tensor)
        del tensor
        torch.full((4096, 1024), -1.0, device="cuda")
        assert torch.equal(copy.fetch(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_autograd_keeps_nothing_on_the_gpu() -> None:
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    with kept_on_host():
        y = (x * 2).exp()
    before = torch.cuda.memory_allocated()
    loss = y.sum()
    del y
    assert torch.cuda.memory_allocated() < before
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (x * 2).exp().detach())
