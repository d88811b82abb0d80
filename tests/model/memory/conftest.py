"""A model on the meta device that takes the ways of CUDA, so that the memory of a GPU can be followed without one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mixcn.model import causal_lm, head
from lightning_mixcn.model.attention import documents
from lightning_mixcn.model.attention import fused as attention
from lightning_mixcn.model.attention.packed import PackedDocuments
from lightning_mixcn.model.experts import fused, grouped, loop
from lightning_mixcn.model.experts import path as expert_path
from lightning_mixcn.model.experts.routing import DeviceRouting, Routing, route_rows_on_device
from lightning_mixcn.model.nf4.storage import NF4Weight


class _FusedNorm(torch.autograd.Function):
    """Keeps what the fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def _route_evenly(index_TK: Tensor, num_experts: int, padded: bool) -> Routing:
    """Give every expert the same rows: which ones, no numbers say on meta."""
    token, row, _ = route_rows_on_device(index_TK, num_experts)
    return Routing(token, row, [index_TK.numel() * expert // num_experts for expert in range(num_experts + 1)])


class _Ends:
    """Reads where experts' rows end, for the one path that asks the host for them."""

    rows = 0

    @classmethod
    def route(cls, index_TK: Tensor, num_experts: int) -> DeviceRouting:
        cls.rows = index_TK.numel()
        return route_rows_on_device(index_TK, num_experts)

    @classmethod
    def read(cls, ends_E: Tensor) -> list[int]:
        return [cls.rows * (expert + 1) // len(ends_E) for expert in range(len(ends_E))]


def _mask(dropout: loop.Dropout, shape: tuple[int, ...], stream: int, like: Tensor) -> Tensor | None:
    """Draw as `Dropout.mask` does; meta has no generators."""
    if dropout.probability == 0.0:
        return None
    kept = torch.rand(shape, device=like.device) >= dropout.probability
    return kept.to(like.dtype).div_(1.0 - dropout.probability)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _swiglu_backward(gate: Tensor, up: Tensor, dh: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), dh, torch.empty_like(gate), gate.new_empty(len(gate), dtype=torch.float32)


def _decoded(weight: Any, dtype: torch.dtype) -> Tensor:
    """Make the stack alone, as the kernel does."""
    return torch.empty(weight.shape, dtype=dtype, device="meta")


def _decoding_product(rows: Tensor, weight: Any, ends: Tensor, transposed: bool) -> Tensor:
    if not isinstance(weight, NF4Weight):
        return grouped.stack_product(rows, weight, ends, transposed)
    return rows.new_empty(len(rows), weight.shape[1 if transposed else 2])


@pytest.fixture
def cuda_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meta device stand in for a GPU: kernels allocate what they do there, rows are shared evenly."""
    monkeypatch.setitem(head._CHUNK_LOGITS, "meta", head._CHUNK_LOGITS["cuda"])
    monkeypatch.setattr(
        documents,
        "locate_documents",
        lambda positions, *_: PackedDocuments(torch.empty(3, dtype=torch.int32, device="meta"), positions.shape[1]),
    )
    monkeypatch.setattr(attention, "_runs_triton", lambda _: True)
    monkeypatch.setattr(head, "_runs_triton", lambda _: True)
    monkeypatch.setattr(causal_lm.FusedRMSNorm, "forward", lambda _, x: _FusedNorm.apply(x))
    monkeypatch.setattr(loop, "route_rows", _route_evenly)
    monkeypatch.setattr(fused, "route_rows", _route_evenly)
    monkeypatch.setattr(grouped, "route_rows_on_device", _Ends.route)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda ends: _Ends.read(ends))
    monkeypatch.setattr(loop.Dropout, "mask", _mask)
    monkeypatch.setattr(expert_path, "_obstacle", lambda *_: None)
    monkeypatch.setattr(grouped, "_decoded", _decoded)
    monkeypatch.setattr(grouped, "swiglu", _swiglu)
    monkeypatch.setattr(grouped, "swiglu_backward", _swiglu_backward)
    monkeypatch.setitem(expert_path.PATHS, "decode", lambda *args: grouped.grouped_experts(_decoding_product, *args))
