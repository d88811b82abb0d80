"""Choose how the expert block is computed: its paths, which of them wins where, and what keeps one from running.

Legend: T tokens, H hidden, E experts, K experts a token.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import TEXT, expect, first_fault, mapping_of, record
from lightning_mixcn.model.kernels import has_triton
from lightning_mixcn.model.nf4.linear import FrozenLinear

from .fused import fused_experts
from .grouped import decoding_product, grouped_experts, stack_product
from .loop import ExpertFactors, ExpertWeights, expert_loop

PATHS: dict[str, Callable[..., Tensor]] = {
    "loop": expert_loop,
    "fused": fused_experts,
    "grouped": partial(grouped_experts, stack_product),
    "decode": partial(grouped_experts, decoding_product),
}

# Capabilities on which `torch._grouped_mm` (2.11 to 2.13) does not fall back to one product a group.
_GROUPED_PRODUCT = ((9, 0), (10, 0))
# Rows of an expert below which a path is the fastest, ascending; the last one has no bound.
Table = tuple[tuple[float, str], ...]


class FastestPaths(NamedTuple):
    """The paths that win on a device: forward with backward, and forward alone."""

    training: Table
    forward: Table


def read_fastest(file: Path) -> dict[str, FastestPaths]:
    """Read which paths win where, as benchmarks/gpu_all.py writes it.

    Args:
        file: JSON object with ``cpu``, ``cuda`` (any GPU that is not listed) and compute capabilities such as ``9.0``.
            Each has the lists ``training`` and ``forward`` of ``[rows of an expert below which it wins, path]``; null,
            in the last entry only, stands for no bound.

    Raises:
        ValueError: it is missing or is something else; the message names the file.
    """
    expected = f"pairs of rows and one of {', '.join(PATHS)}, rows ascending, null last"
    lists = record({kind: expect(expected, _is_table) for kind in FastestPaths._fields})
    remedy = "Copy the package's file again, or measure it with benchmarks/gpu_all.py"
    found = read_object(file, remedy=remedy)
    for check in (record({"cpu": lists, "cuda": lists}), mapping_of(TEXT, lists)):
        if fault := first_fault(found, check):
            raise UserError(f"{str(file)!r}: {fault}. {remedy}")
    return {
        device: FastestPaths(*(_table(tables[kind]) for kind in FastestPaths._fields))
        for device, tables in found.items()
    }


def _is_table(value: Any) -> bool:
    """Tell whether JSON is `Table`."""
    if not isinstance(value, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in value):
        return False
    bounds, paths = [entry[0] for entry in value], [entry[1] for entry in value]
    numbers = all(type(bound) in (int, float) and bound > 0 for bound in bounds[:-1])
    ascending = numbers and all(one < other for one, other in pairwise(bounds[:-1]))
    return bounds[-1:] == [None] and ascending and all(isinstance(path, str) and path in PATHS for path in paths)


def _table(entries: list[Any]) -> Table:
    return tuple((math.inf if below is None else float(below), path) for below, path in entries)


# No GPU has been measured yet. On CUDA it is the path that takes the fewest products and passes over memory by
# arithmetic, and whose kernels were compared in Triton's interpreter; `loop` where that path cannot run.
FASTEST = read_fastest(Path(__file__).with_name("fastest.json"))


def choose_expert_path(x: Tensor, index: Tensor, weights: ExpertWeights, factors: ExpertFactors) -> str:
    """Return the path that the environment variable ``MIXCN_EXPERT_PATH`` names, else the fastest that was measured.

    Args:
        x: ``[T, H]`` in the compute dtype.
        index: ``[T, K]``, the chosen experts.
        weights: Frozen weights.
        factors: LoRA factors.

    Returns:
        A key of `PATHS`; ``loop`` where the fastest path cannot compute these sizes. ``grouped`` and ``decode`` cannot
        where some experts have no factors: a grouped product takes the rows of all experts, side by side.

    Raises:
        ValueError: ``MIXCN_EXPERT_PATH`` is no path, or one that cannot compute these sizes.
    """
    if wanted := _wanted_path():
        if obstacle := _obstacle(wanted, x, weights, factors):
            raise UserError(f"`MIXCN_EXPERT_PATH={wanted}` cannot run here: {obstacle}. Unset it, or set it to loop")
        return wanted
    device = ".".join(map(str, _capability(x.device))) if x.is_cuda else "cpu"
    fastest = FASTEST.get(device, FASTEST["cuda"])
    table = fastest.training if torch.is_grad_enabled() else fastest.forward
    path = _winner(table, index.numel(), weights)
    return "loop" if _obstacle(path, x, weights, factors) else path


def _wanted_path() -> str | None:
    wanted = os.environ.get("MIXCN_EXPERT_PATH")
    if wanted and wanted not in PATHS:
        raise UserError(f"`MIXCN_EXPERT_PATH={wanted!r}` is not known. Expected one of {', '.join(PATHS)}")
    return wanted


def _obstacle(path: str, x: Tensor, weights: ExpertWeights, factors: ExpertFactors) -> str | None:
    """Tell why ``path`` cannot compute the block; ``None`` where it can."""
    if path == "loop":
        return None
    if path in ("fused", "decode") and x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels run on a GPU, not on {x.device.type}"
    if (path in ("fused", "decode") or x.is_cuda) and not has_triton():
        return "Triton is not installed (torch's CUDA builds for Linux bring it)"
    if path == "fused":
        return _obstacle_of_fused(x, weights)
    if factors.slots is not None and len(factors.slots) < weights[0].shape[0]:
        return "its products with LoRA are of all experts, and `train_only` chooses some"
    if x.is_cuda and (x.dtype != torch.bfloat16 or _capability(x.device) not in _GROUPED_PRODUCT):
        return (
            "torch's grouped product is one call in bfloat16 on GPUs of capability 9.0 and 10.0 (H100, B200) only, not "
            f"in {x.dtype} on {'.'.join(map(str, _capability(x.device)))}; elsewhere it waits for each expert's product"
        )
    ranks = [factor.shape[2] for factor in (factors.b_gate, factors.b_up, factors.b_down) if factor is not None]
    odd = [size for size in (x.shape[1], weights[0].shape[1], *ranks) if size * x.element_size() % 16]
    if odd:
        return f"rows of {odd[0]} numbers of {x.element_size()} bytes are no multiple of 16 bytes"
    return None


def _obstacle_of_fused(x: Tensor, weights: ExpertWeights) -> str | None:
    if x.is_cuda and _capability(x.device) < (8, 0):
        return f"its kernels need a GPU of capability 8.0 (A100), not {'.'.join(map(str, _capability(x.device)))}"
    odd = [weight.shape[2] for weight in weights if weight.shape[2] % 2]
    return f"rows of {odd[0]} weights begin inside a byte of two" if odd else None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def training_path(
    projections: Sequence[FrozenLinear], tokens: int, top_k: int, dtype: torch.dtype, device_type: str
) -> str:
    """Return the path that a training step will take, from sizes alone.

    Args:
        projections: Gate, up and down of an expert block, on any device.
        tokens: T.
        top_k: K.
        dtype: Compute dtype.
        device_type: ``cpu`` or ``cuda``. Without a GPU at hand, ``cuda`` is one that no table of `FASTEST` has.

    Raises:
        ValueError: as `choose_expert_path`.
    """
    weights = projections[0].storage, projections[1].storage, projections[2].storage
    if device_type == "cuda" and not torch.cuda.is_available():
        return _wanted_path() or _winner(FASTEST["cuda"].training, tokens * top_k, weights)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        x, index = torch.empty(tokens, weights[0].shape[2], dtype=dtype, device=device_type), torch.empty(tokens, top_k)
        gate, up, down = (None if not (pair := module.factors(dtype)) else pair.b for module in projections)
        factors = ExpertFactors(None, gate, up, None, down, projections[0].slots)
        return choose_expert_path(x, index, weights, factors)


def _winner(table: Table, rows: int, weights: ExpertWeights) -> str:
    rows_per_expert = rows / weights[0].shape[0]
    return next(path for below, path in table if rows_per_expert < below)
