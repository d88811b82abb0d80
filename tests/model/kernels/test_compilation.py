"""Every kernel goes through Triton's compiler for real GPUs, which needs none: it accepts less than the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "89", "90"])
def test_kernels_compile(capability: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), capability],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
