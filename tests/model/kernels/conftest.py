"""Where kernels run: on the GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The device; skips where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    return "cuda" if torch.cuda.is_available() else "cpu"
