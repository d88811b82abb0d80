"""Which way the expert block computes: what there is, and the choice by device and size.

| path | frozen weights | host synchronisation | live beside the rows, Mixtral-8x7B |
|---|---|---|---|
| ``loop`` | decoded matrix by matrix, one GEMM an expert | one a layer | one matrix, 0.12 GB |
| ``grouped`` | a whole projection decoded, one grouped GEMM | none | one projection, 0.94 GB |
| ``decode`` | decoded inside the GEMM's kernel, tile by tile | none | nothing |

Decoding costs ``grouped`` and ``loop`` the same traffic for any number of rows, and only ``loop`` skips experts without
rows. ``decode`` reads 4 bits instead of writing and reading 16, but decodes anew for each tile of rows: expected to win
at few rows an expert, to lose at many. By count, one token of Mixtral-8x7B moves 0.2 GB a layer with ``decode``, 2.0
with ``loop`` and 4.3 with ``grouped``.

LoRA dropout costs ``grouped`` and ``decode`` a synchronisation and the memory of a mask for all rows: masks are drawn
expert by expert, the same on each path. On the CPU these two are for tests: their rows are not padded, and oneDNN keeps
a kernel for each row count.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .expert_grouped import GroupedExperts
from .expert_loop import ExpertLoop
from .expert_operands import BlockGradients, BlockInputs
from .grouped_product import decoding_product, stack_product


class ExpertPath(Protocol):
    """One way to compute the block and its gradients."""

    def forward(self, inputs: BlockInputs, index: Tensor) -> tuple[Tensor, Sequence[Tensor | None], Any]:
        """Run the block.

        Args:
            inputs: What it is given.
            index: ``[T, K]`` int64, the chosen experts.

        Returns:
            The result ``[T, H]`` in the dtype of ``x``, the tensors that backward needs beside the inputs, and the
            experts' row offsets where the host knows them.
        """

    def backward(
        self, inputs: BlockInputs, kept: Sequence[Any], offsets: Any, grad_TH: Tensor, needs_dx: bool
    ) -> BlockGradients:
        """Gradients of the inputs, from what `forward` gave."""


PATHS: dict[str, ExpertPath] = {
    "loop": ExpertLoop(),
    "grouped": GroupedExperts(stack_product),
    "decode": GroupedExperts(decoding_product),
}

# Device type to (rows per expert below which, path), in ascending order: the winners that benchmarks/expert_block.py
# prints. No GPU has been measured yet, so CUDA has the path that needs no measurement to be right.
FASTEST: dict[str, tuple[tuple[float, str], ...]] = {"cpu": ((math.inf, "loop"),), "cuda": ((math.inf, "loop"),)}


def choose_expert_path(inputs: BlockInputs, index: Tensor) -> str:
    """The path to take: that of the environment variable ``MIXCN_EXPERT_PATH``, else the fastest that was measured.

    Args:
        inputs: What the block is given.
        index: ``[T, K]``, the chosen experts.

    Returns:
        A key of `PATHS`. From the table, ``loop`` stands in for a path that cannot compute these sizes.

    Raises:
        ValueError: ``MIXCN_EXPERT_PATH`` is no path, or one that cannot compute these sizes.
    """
    if wanted := os.environ.get("MIXCN_EXPERT_PATH"):
        if wanted not in PATHS:
            raise ValueError(f"`MIXCN_EXPERT_PATH={wanted!r}` is not known. Expected one of {', '.join(PATHS)}")
        if obstacle := _obstacle(wanted, inputs):
            raise ValueError(f"`MIXCN_EXPERT_PATH={wanted}` cannot run here: {obstacle}. Unset it, or set it to loop")
        return wanted
    rows_per_expert = index.numel() / inputs.weights.gate.shape[0]
    table = FASTEST.get(inputs.x.device.type, FASTEST["cpu"])
    path = next(path for below, path in table if rows_per_expert < below)
    return "loop" if _obstacle(path, inputs) else path


def _obstacle(path: str, inputs: BlockInputs) -> str | None:
    """Why ``path`` cannot compute the block; ``None`` where it can."""
    x, _, weights, _, lora = inputs
    if path == "loop":
        return None
    if path == "decode" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernel runs on a GPU, not on {x.device.type}"
    if (path == "decode" or x.is_cuda) and not _has_triton():
        return "Triton is not installed (torch's CUDA builds for Linux bring it)"
    if x.is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return f"torch's grouped product needs bfloat16 and an Ampere GPU or a later one, not {x.dtype}"
    ranks = [factor.shape[2] for factor in (lora.b_gate, lora.b_up, lora.b_down) if factor is not None]
    odd = [size for size in (x.shape[1], weights.gate.shape[1], *ranks) if size * x.element_size() % 16]
    if odd:
        return f"rows of {odd[0]} numbers of {x.element_size()} bytes are no multiple of 16 bytes"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
