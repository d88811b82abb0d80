"""Cross-entropy and its gradient against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

# In bfloat16 the interpreter cuts off instead of rounding; half a unit in the last place.
PRECISIONS = [(torch.float32, 1e-6), (torch.float16, 6e-4)] + [(torch.bfloat16, 5e-3)] * torch.cuda.is_available()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (7, 4096), (3, 9001)])
def test_it_equals_torch(
    rows: int, vocabulary: int, dtype: torch.dtype, tolerance: float, scaled: bool, device: str
) -> None:
    from lightning_mixcn.model.kernels.cross_entropy import cross_entropy

    torch.manual_seed(rows)
    logits, target = (torch.randn(rows, vocabulary) * 4).to(device, dtype), torch.randint(vocabulary, (rows,))
    target[0] = vocabulary - 1
    grad = torch.rand(rows) if scaled else None
    exact = logits.cpu().double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction="none")
    expected.backward(torch.ones(rows).double() if grad is None else grad.double())
    before = logits.clone()
    nll, none = cross_entropy(logits, target.to(device), wants_gradient=False)
    assert none is None
    assert torch.equal(logits, before)
    again, gradient = cross_entropy(logits, target.to(device), None if grad is None else grad.to(device))
    assert torch.equal(again, nll)
    assert gradient is logits
    assert exact.grad is not None
    torch.testing.assert_close(nll.cpu().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert (gradient.cpu().double() - exact.grad).norm() <= tolerance * exact.grad.norm()


def test_large_logits_stay_finite(device: str) -> None:
    from lightning_mixcn.model.kernels.cross_entropy import cross_entropy

    logits = torch.tensor([[4e4, -4e4, 0.0], [4e4, -4e4, 0.0], [-torch.inf, 5.0, -torch.inf]], device=device)
    nll, gradient = cross_entropy(logits, torch.tensor([0, 1, 1], device=device))
    assert nll.tolist() == [0.0, 8e4, 0.0]
    assert gradient is not None
    assert gradient.tolist() == [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
