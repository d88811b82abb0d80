"""Compile every kernel for a GPU of the given compute capability, and look at what comes out; run as a program.

Not a test module of its own: Triton's interpreter, which the tests switch on, replaces the compiler.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_mixcn.model.kernels import (
    cross_entropy,
    dropout,
    expert_swiglu,
    nf4_decode,
    nf4_product,
    operand,
    rotary,
    rows,
    swiglu,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Numbers that kernels do not specialise, or that have any value; pointers and strides of real tensors are multiples
# of 16.
ODD = (
    "seed", "threshold", "stream", "column", "rows", "tokens", "decoding", "rank", "behind", "experts", "table",
)  # fmt: skip
EVEN = (
    "count", "width", "stride", "out_stride", "dropped_stride", "more_stride", "h_stride", "dh_stride", "lora_stride",
    "first", "b_row", "height", "width_out", "width_in", "query_stride", "key_stride",
    "to_query_stride", "to_key_stride",
)  # fmt: skip
TYPES = dict.fromkeys((*ODD, *EVEN), "i32") | {
    "scale": "fp32", "token": "*i64", "row": "*i64", "weight": "*fp32", "dweight": "*fp32", "b": "*fp32",
    "ends": "*i32", "codes": "*u8", "scales": "*u8", "super_scale": "*fp32", "super_offset": "*fp32",
    "dynamic_code": "*fp32", "nf4_code": "*fp32",
}  # fmt: skip


def compiled(capability: int, kernel: Any, constants: dict[str, Any], types: dict[str, str] | None = None) -> str:
    """Return the PTX, after a look at the registers: none may be kept in memory.

    Args:
        capability: 80, 89 or 90.
        kernel: A function of `triton.jit`.
        constants: Its constants.
        types: Types of arguments that are not those of `TYPES` or pointers to bfloat16.
    """
    names = kernel.arg_names
    known = TYPES | (types or {})
    signature = {name: "constexpr" if name in constants else known.get(name, "*bf16") for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (name in EVEN and signature[name] == "i32")
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert spilled is not None, usage
    assert spilled.groups() == ("0", "0"), f"{kernel.__name__} with {constants} keeps registers in memory: {usage}"
    return str(built.asm["ptx"])


def vectors(ptx: str) -> tuple[int, int]:
    """Return the numbers of loads and stores of 16 bytes."""
    return len(re.findall(r"ld\.global[^;]*v4", ptx)), len(re.findall(r"st\.global[^;]*v4", ptx))


def check_rows(capability: int, dropped: bool) -> None:
    """Count accesses: one for a thread's eight numbers of each of four runs."""
    run = {"ROWS": 8, "RUN": dropout.RUN, "DROPPED": dropped}
    assert vectors(compiled(capability, rows._gather, {"PLAIN": True} | run)) == (4, 4 + 4 * dropped)
    constants = {"CHOICES": 2, "WEIGHTED": not dropped, "MORE": dropped} | run
    assert vectors(compiled(capability, rows._sum, constants, {"rows": "*bf16"})) == (8 + 8 * dropped, 4)
    assert vectors(compiled(capability, expert_swiglu._forward, run)) == (8, 4 + 4 * dropped)
    for lora in (True, False):
        ptx = compiled(capability, expert_swiglu._backward, {"LORA": lora, "AGAIN": lora} | run)
        assert vectors(ptx) == (12 + 4 * lora, 8 + 4 * lora)


def check_rotation(capability: int) -> None:
    """Count accesses for Mixtral's heads: both halves of 32 x 128 numbers by 128 threads, and of both tables."""
    for backwards in (True, False):
        constants = {"HEADS": 32, "KEY_HEADS": 8, "SIZE": 128, "BACKWARDS": backwards}
        assert vectors(compiled(capability, rotary._rotate, constants)) == (4 + 2, 4)


def check_loss(capability: int) -> None:
    """Find loads of 16 bytes, and one division a logit, in the pass that writes."""
    types = {"target": "*i64", "grad": "*fp32", "nll": "*fp32"}
    for scaled in (True, False):
        constants = {"GRADIENT": True, "SCALED": scaled, "BLOCK": 4096}
        assert vectors(compiled(capability, cross_entropy._cross_entropy, constants, types)) == (8, 4)
    compiled(capability, cross_entropy._cross_entropy, {"GRADIENT": False, "SCALED": False, "BLOCK": 4096}, types)


def check_decoding(capability: int) -> None:
    """Products and sums are rounded one by one; 16 bytes of codes make 32 numbers."""
    assert "fma.rn.f32" not in compiled(capability, nf4_decode._decode, {"BLOCKS": 64})
    for aligned, behind in ((True, 64), (True, 128), (True, 256), (True, 1024), (False, 128)):
        constants = {"ALIGNED": aligned, "BLOCKS": 64, "B_ROWS": 4096 // behind, "BEHIND": behind, "b_column": 1}
        ptx = compiled(capability, operand._operand, constants)
        assert "fma.rn.f32" not in ptx
        assert not aligned or vectors(ptx) == (1, 4)


def check_product(capability: int) -> None:
    """Find sums on tensor cores, and no look-up of a number that is a copy of four bytes to shared memory."""
    for transposed in (True, False):
        for aligned, count in ((True, 16), (True, 64), (False, 64)):
            constants = {"EXPERTS": 8, "TRANSPOSED": transposed, "ALIGNED": aligned, "BLOCK_ROWS": count, "TILE": 64}
            ptx = compiled(capability, nf4_product._product, constants, {"rows": "*bf16"})
            assert "mma" in ptx
            # Of a block, its two second-level numbers and its place in the 8-bit code, for each of three stages.
            copies = re.findall(r"cp\.async\.ca\.shared\.global[^;]*, 0x4", ptx)
            assert not aligned or len(copies) <= 9, f"{len(copies)} copies of four bytes"


def main() -> None:
    """Check all kernels."""
    capability = int(sys.argv[1])
    compiled(capability, swiglu._forward, {"BLOCK": 1024})
    compiled(capability, swiglu._backward, {"BLOCK": 1024})
    check_rows(capability, dropped=True)
    check_rows(capability, dropped=False)
    check_rotation(capability)
    check_loss(capability)
    check_decoding(capability)
    check_product(capability)


if __name__ == "__main__":
    main()
