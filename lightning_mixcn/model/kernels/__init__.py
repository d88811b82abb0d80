"""Triton kernels, imported when a GPU first needs them: torch's CUDA builds bring Triton, nothing else asks for it.

Each has a counterpart in plain torch or bitsandbytes (`nf4.codec`, `experts.grouped`), which the tests compare it with,
on the CPU in Triton's interpreter.
"""

import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None
