"""SwiGLU's kernels against torch's autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

# In bfloat16 the interpreter cuts off instead of rounding; a GPU rounds. Tolerances: half a unit in the last place.
DTYPES = [(torch.float32, 1e-6), (torch.float16, 5e-4)] + [(torch.bfloat16, 4e-3)] * torch.cuda.is_available()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (7, 48), (3, 2500)])
def test_equals_autograd(rows: int, width: int, dtype: torch.dtype, tolerance: float, device: str) -> None:
    from lightning_mixcn.model.kernels.swiglu import swiglu_backward_kernel, swiglu_kernel

    torch.manual_seed(width)
    gate, up, dh = (torch.randn(rows, width).to(device, dtype) * 3 for _ in range(3))
    weight = torch.rand(rows, device=device)
    exact_gate, exact_up, exact_weight = (tensor.double().requires_grad_() for tensor in (gate, up, weight))
    exact = F.silu(exact_gate) * exact_up
    # The row's routing weight scales what comes after h, so its gradient is <dh, h>.
    (exact * exact_weight[:, None]).backward(dh.double())
    h, dgate, dup, dweight = swiglu_backward_kernel(gate, up, dh.clone(), weight)
    assert torch.equal(h, swiglu_kernel(gate, up))
    assert dweight.dtype == torch.float32
    for value, truth in ((h, exact), (dgate, exact_gate.grad), (dup, exact_up.grad), (dweight, exact_weight.grad)):
        assert truth is not None
        assert (value.double() - truth).norm() <= tolerance * truth.norm()
