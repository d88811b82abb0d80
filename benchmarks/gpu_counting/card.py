"""A card that is not there: on the meta device the model takes CUDA's branches, and what cannot run is counted.

No memory is held and nothing is computed. Whatever asks for a tensor's values waits for the device; experts' rows are
answered as evenly shared, any other question is an error. A Triton kernel is not run; the function that would launch it
counts as one. Streams have no order; what is launched within ``torch.cuda.stream`` counts as the second stream's.
"""

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lightning_mixcn.model import head, kernels
from lightning_mixcn.model.attention import documents
from lightning_mixcn.model.attention.packed import PackedDocuments
from lightning_mixcn.model.memory import checkpointing

from .trace import Trace, stored_bytes

CAPABILITY = (9, 0)


class _Stream:
    """A stream or an event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Stream"]:
        return lambda *args, **kwargs: self


@contextmanager
def pretended_card(trace: Trace, path: str, rows: int, experts: int, longest: int) -> Iterator[None]:
    """Let the meta device be a card whose work goes to ``trace``.

    Args:
        trace: Where the work is counted.
        path: Of the experts, see ``MIXCN_EXPERT_PATH``.
        rows: Routed rows of a layer, tokens times experts a token.
        experts: Of a layer.
        longest: Tokens of the longest document.
    """

    def tolist(tensor: Tensor) -> Any:
        if not tensor.is_meta:
            return plain_tolist(tensor)
        assert tensor.shape == (experts,), f"the host asks for {list(tensor.shape)} values, which nobody knows here"
        trace.wait("experts' rows")
        return [rows * (expert + 1) // experts for expert in range(experts)]

    def pack(position_ids: Tensor) -> PackedDocuments:
        trace.wait("documents")
        count = position_ids.numel() // longest + 1
        return PackedDocuments(torch.empty(count, dtype=torch.int32, device="meta"), longest)

    @contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        trace.side, before = chosen is not None and chosen is not main, trace.side
        yield
        trace.side = before

    plain_tolist, main = Tensor.tolist, _Stream()
    with ExitStack() as stack:
        for target, name, value in (
            (Tensor, "is_cuda", property(lambda tensor: tensor.is_meta)),
            (Tensor, "tolist", tolist),
            (Tensor, "record_stream", lambda tensor, stream: None),
            (torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None)),
            (torch.version, "cuda", "13.0"),
            (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "Event", _Stream),
            (torch.cuda, "current_stream", lambda device=None: main),
            (torch.cuda, "stream", stream),
            (F, "dropout", _dropout),
            (F, "rms_norm", _rms_norm(trace)),
            (documents, "serves", lambda *args: True),
            (documents, "pack_documents", pack),
            (checkpointing, "HostCopy", _host_copy(trace)),
            *_counted_kernels(trace),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch.dict(head._CHUNK_LOGITS, {"meta": head._CHUNK_LOGITS["cuda"]}))
        stack.enter_context(patch.dict(os.environ, {"MIXCN_EXPERT_PATH": path}))
        yield


def _counted_kernels(trace: Trace) -> Iterator[tuple[Any, str, Any]]:
    """Yield what replaces each function that launches a Triton kernel, and what keeps the kernel from being run."""
    for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == found.name and not name.startswith("_"):
                yield module, name, _counted(trace, function)
    for launcher in (JITFunction, InterpretedFunction):
        yield launcher, "run", lambda kernel, *args, **kwargs: None


def _counted(trace: Trace, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        trace.launch(function, args, kwargs, result)
        return result

    return counted


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop in one kernel and with a mask of bytes, as on CUDA; on other devices torch takes several."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0.0 else x


def _rms_norm(trace: Trace) -> Callable[..., Tensor]:
    """Return a norm of one kernel forward and one backward, as on CUDA; on other devices torch takes several."""

    class CountedNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            trace.add("rms_norm", "element-wise", 2 * stored_bytes(x))
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            trace.add("rms_norm_backward", "element-wise", 3 * stored_bytes(grad))
            return torch.empty_like(grad)

    return lambda x, shape, weight=None, eps=None: CountedNorm.apply(x)


def _host_copy(trace: Trace) -> type:
    """Return a `HostCopy` that moves nothing; copies out are the copy stream's, and back in the stream's that waits."""

    class CountedHostCopy:
        def __init__(self, tensor: Tensor) -> None:
            self._tensor = tensor
            trace.side, before = True, trace.side
            trace.add("copy to the host", "host copy", stored_bytes(tensor))
            trace.side = before

        def fetch(self) -> Tensor:
            trace.add("copy from the host", "host copy", stored_bytes(self._tensor))
            return torch.empty_like(self._tensor)

    return CountedHostCopy
