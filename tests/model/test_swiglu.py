"""SwiGLU by torch's operations against autograd."""

import torch
import torch.nn.functional as F

from lightning_mixcn.model.experts.grouped import swiglu, swiglu_backward


def test_equals_autograd() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(7, 40, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, dh = torch.rand(7, dtype=torch.float64, requires_grad=True), torch.randn(7, 40, dtype=torch.float64)
    h = F.silu(gate) * up
    (h * weight[:, None]).backward(dh)
    with torch.no_grad():
        torch.testing.assert_close(swiglu(gate, up), h)
        found = swiglu_backward(gate, up, dh.clone(), weight)
    torch.testing.assert_close(found.h, h)
    torch.testing.assert_close(found.gate, gate.grad)
    torch.testing.assert_close(found.up, up.grad)
    assert weight.grad is not None
    torch.testing.assert_close(found.weight, weight.grad.float())
