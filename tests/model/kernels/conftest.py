"""Where kernels run: on the GPU, or on the CPU in Triton's interpreter."""

import os

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Return the device; skips where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    chosen: str = request.param
    if chosen == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: set TRITON_INTERPRET=1")
    return chosen
