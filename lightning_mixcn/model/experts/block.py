"""Mixtral's router and experts with frozen, possibly 4-bit weights; drop-in for transformers' modules.

Children are named as PEFT sees them: ``gate_proj``, ``up_proj``, ``down_proj`` are the paper's w1, w3, w2.

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, S = T·K routed rows, n rows of one expert.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import TEXT, expect, first_fault, mapping_of, record
from lightning_mixcn.model.nf4.linear import FrozenLinear

from .fused import fused_experts, fused_loop
from .grouped import decoding_product, grouped_experts, stack_product
from .loop import Dropout, ExpertFactors, ExpertWeights, expert_loop
from .routing import route_rows, sum_choices

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
        A key of `PATHS`; ``loop`` where the fastest path cannot compute these sizes.

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
    if (path in ("fused", "decode") or x.is_cuda) and not _has_triton():
        return "Triton is not installed (torch's CUDA builds for Linux bring it)"
    if path == "fused":
        return _obstacle_of_fused(x, weights)
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


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def training_path(experts: "Experts", tokens: int, top_k: int, dtype: torch.dtype, device_type: str) -> str:
    """Return the path that a training step will take, from sizes alone.

    Args:
        experts: An expert block, on any device.
        tokens: T.
        top_k: K.
        dtype: Compute dtype.
        device_type: ``cpu`` or ``cuda``. Without a GPU at hand, ``cuda`` is one that no table of `FASTEST` has.

    Raises:
        ValueError: as `choose_expert_path`.
    """
    weights = experts.gate_proj.storage, experts.up_proj.storage, experts.down_proj.storage
    if device_type == "cuda" and not torch.cuda.is_available():
        return _wanted_path() or _winner(FASTEST["cuda"].training, tokens * top_k, weights)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        x, index = torch.empty(tokens, weights[0].shape[2], dtype=dtype, device=device_type), torch.empty(tokens, top_k)
        adapted = (experts.gate_proj, experts.up_proj, experts.down_proj)
        gate, up, down = (None if not (pair := module.factors(dtype)) else pair.b for module in adapted)
        return choose_expert_path(x, index, weights, ExpertFactors(None, gate, up, None, down))


def _winner(table: Table, rows: int, weights: ExpertWeights) -> str:
    rows_per_expert = rows / weights[0].shape[0]
    return next(path for below, path in table if rows_per_expert < below)


class Router(MixtralTopKRouter):
    """Top-k softmax router whose weight is a `FrozenLinear`, so that PEFT can adapt it.

    A subclass of transformers' router, because transformers records router logits by that class.
    """

    def __init__(self, config: MixtralConfig, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.linear = FrozenLinear(
            config.hidden_size, config.num_local_experts, quantization="none", dtype=dtype, device=device
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            hidden_states: ``[..., H]``.

        Returns:
            Router logits ``[T, E]`` in the input's dtype, routing weights ``[T, K]`` float32 that sum to 1, and the
            chosen experts ``[T, K]`` int64.
        """
        logits = self.linear(hidden_states.reshape(-1, self.hidden_dim))
        weights, index = torch.topk(logits.float().softmax(dim=-1), self.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), index


class Experts(nn.Module):
    """All experts of a layer.

    Args:
        config: Sizes.
        quantization: ``nf4`` or ``none``.
        dtype: Storage type where not quantised.
        device: Device of the (uninitialised) weights.
    """

    def __init__(
        self, config: MixtralConfig, quantization: str, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        hidden, intermediate, experts = config.hidden_size, config.intermediate_size, config.num_local_experts

        def projection(in_features: int, out_features: int) -> FrozenLinear:
            return FrozenLinear(
                in_features, out_features, experts, quantization=quantization, dtype=dtype, device=device
            )

        self.gate_proj = projection(hidden, intermediate)
        self.up_proj = projection(hidden, intermediate)
        self.down_proj = projection(intermediate, hidden)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the chosen experts and sum their weighted results.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, K]`` int64.
            top_k_weights: ``[T, K]``.

        Returns:
            ``[T, H]`` in the dtype of ``hidden_states``.
        """
        projections = self.gate_proj, self.up_proj, self.down_proj
        weights = self.gate_proj.storage, self.up_proj.storage, self.down_proj.storage
        if not self.training and all(
            weight.gemv is not None and weight.gemv.serves(hidden_states) for weight in weights
        ):
            return self._forward_gemv(hidden_states, top_k_index, top_k_weights)
        masters = [projection.active_masters() for projection in projections]
        gate, up, down = (pair and pair.b for pair in masters)
        path = choose_expert_path(hidden_states, top_k_index, weights, ExpertFactors(None, gate, up, None, down))
        probability = max((pair.dropout for pair in masters if pair is not None), default=0.0)
        # Drawn from torch's CPU generator, which activation checkpointing restores: recomputation sees the same masks.
        dropout = Dropout(probability, int(torch.randint(2**31, (), device="cpu"))) if probability > 0.0 else Dropout()
        operands = hidden_states, top_k_index, top_k_weights, weights, dropout
        if path == "fused":  # casts the masters itself, where it copies them anyway
            gate_scale, up_scale, down_scale = (1.0 if pair is None else pair.scale for pair in masters)
            pairs = [(None, None) if pair is None else (pair.a, pair.b) for pair in masters]
            return fused_loop(*operands, (gate_scale, up_scale, down_scale), *chain.from_iterable(pairs))
        return PATHS[path](*operands, *self._factors(hidden_states.dtype))

    def _factors(self, dtype: torch.dtype) -> ExpertFactors:
        gate, up, down = (projection.factors(dtype) for projection in (self.gate_proj, self.up_proj, self.down_proj))
        a_gate_up = [pair.a for pair in (gate, up) if pair is not None]
        return ExpertFactors(
            torch.cat(a_gate_up, dim=1) if a_gate_up else None,
            gate and gate.b,
            up and up.b,
            down and down.a,
            down and down.b,
        )

    def _forward_gemv(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Compute the block for a few tokens without gradients, by the kernel of `GemvStack`."""
        routing = route_rows(index_TK, self.gate_proj.groups, padded=False)
        y_SH = x_TH.new_empty(len(routing.token), x_TH.shape[1])
        for expert, rows in routing.experts():
            x_nH = x_TH[routing.token[rows]]
            h_nI = F.silu(_gemv(self.gate_proj, x_nH, expert)).mul_(_gemv(self.up_proj, x_nH, expert))
            y_SH[rows] = _gemv(self.down_proj, h_nI, expert)
        return sum_choices(y_SH, routing.row, weight_TK, x_TH.dtype)


def _gemv(projection: FrozenLinear, rows: Tensor, expert: int) -> Tensor:
    assert projection.storage.gemv is not None
    y = projection.storage.gemv.product(rows, expert)
    factors = projection.factors(rows.dtype, slice(expert, expert + 1))
    return y if factors is None else y.addmm_(rows @ factors.a[0].t(), factors.b[0].t())
