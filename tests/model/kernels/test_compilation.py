"""Every kernel goes through Triton's compiler for real GPUs, which needs none: it accepts less than the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_mixcn.model.kernels import nf4_decode, nf4_product, swiglu

BF16, I32, CODED = "*bf16", "i32", {"codes": "*u8", "scales": "*u8", "super_scale": "*fp32", "super_offset": "*fp32",
                                    "dynamic_code": "*fp32", "nf4_code": "*fp32"}

def compiled(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, BF16) for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    built = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"enable_fp_fusion": False})
    return built.asm["ptx"]

compiled(swiglu._forward, {"count": I32}, {"BLOCK": 1024})
compiled(swiglu._backward, {"dweight": "*fp32", "width": I32}, {"BLOCK": 1024})
assert "fma.rn.f32" not in compiled(nf4_decode._decode, CODED, {"BLOCKS": 64})
sizes = {"ends": "*i32", "experts": I32, "width_out": I32, "width_in": I32}
for transposed in (True, False):
    for aligned, rows in ((True, 16), (False, 64)):
        constants = {"EXPERTS": 8, "TRANSPOSED": transposed, "ALIGNED": aligned, "BLOCK_ROWS": rows, "TILE": 64}
        # Sums run on tensor cores.
        assert "mma" in compiled(nf4_product._product, CODED | sizes, constants)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile(capability: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
