"""Where kernels run: on the GPU, or on the CPU in Triton's interpreter."""

import os

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Return the device; skips where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("torch sees no GPU, and Triton's interpreter is off: set TRITON_INTERPRET=1")
    return "cpu"
