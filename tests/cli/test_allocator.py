"""Settings of the allocators."""

import os
import subprocess
import sys

import pytest

from lightning_mixcn.cli.allocator import grow_gpu_segments

PROGRAM = "from lightning_mixcn.cli.allocator import keep_freed_memory; print(keep_freed_memory())"
GLIBC = sys.platform.startswith("linux") and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")

# Gives back a block that is larger than the usual threshold, and says how much stays resident.
KEPT = """
import ctypes
from lightning_mixcn.cli.allocator import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 16 * 1024 * 1024
block = libc.malloc(size)
ctypes.memset(block, 1, size)
libc.free(block)
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * 4096)
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return done.stdout.strip()


@pytest.mark.skipif(not GLIBC, reason="the settings are glibc's")
def test_freed_memory_stays() -> None:
    with_it, without = (int(run(KEPT.format(call=call))) for call in ("assert keep_freed_memory()", ""))
    assert with_it - without > 12 * 1024 * 1024


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
    ids=["by default", "given", "given by its older name"],
)
def test_segments_on_a_gpu_grow(given: dict[str, str], then: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", dict(given))
    grow_gpu_segments()
    assert os.environ == then


def test_a_command_sets_it_before_torch_is_there() -> None:
    program = (
        "import os, sys; import lightning_mixcn.cli.allocator as a; real = a.grow_gpu_segments\n"
        "def spy(): print('torch' in sys.modules); real()\n"
        "a.grow_gpu_segments = spy; from lightning_mixcn.cli import main; main(['quantize', '--help'])"
    )
    assert run(program).startswith("False")


def test_settings_of_the_environment_stay() -> None:
    assert run(PROGRAM, MALLOC_TRIM_THRESHOLD_="131072") == "False"
