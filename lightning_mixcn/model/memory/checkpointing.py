"""Choose what is kept for the backward pass and what is computed again."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.causal_lm import base_of, has_cache


class HostCopy:
    """A tensor of a GPU in pinned memory of the host.

    The copy runs on a stream of its own. `record_stream` keeps the tensor's memory from being given away before it is
    done, and the event keeps `fetch` from reading before.

    Args:
        tensor: On a CUDA device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._device, stream = tensor.device, _copy_stream(tensor.device)
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # whatever computes the tensor
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self._copied = stream.record_event()

    def fetch(self) -> Tensor:
        """Return the tensor, on its device again.

        On the stream that needs it: in a row of 128 K tokens a layer of Mixtral-8x7B fetches 8 KB a token and computes
        7 GFLOP, so waiting takes one or two percent of the time.
        """
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        return self._host.to(self._device, non_blocking=True)


def kept_on_host() -> saved_tensors_hooks:
    """Return a context manager within which autograd saves to the host."""
    return saved_tensors_hooks(HostCopy, HostCopy.fetch)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


MODES = ("none", "selective", "full", "offload")


def set_activation_checkpointing(model: nn.Module, mode: str | Sequence[str]) -> None:
    """Choose between memory and recomputation.

    Args:
        model: The model (or the PeftModel around it).
        mode: ``none``: every activation is kept (the expert block still keeps only its input and two projections).
            ``selective``: attention is computed again, the experts' products are kept: they are most of the arithmetic.
            ``full``: only each layer's input is kept and the layer runs again in backward. ``offload``: the same, and
            a GPU's layers keep their inputs in the host's memory. Or one of them for each layer.

    Raises:
        ValueError: any other ``mode``, or not as many as there are layers.
    """
    layers = list(base_of(model).model.layers)
    for layer, chosen in zip(layers, layer_modes(mode, len(layers)), strict=True):
        for module in (layer, layer.self_attn):
            module.__dict__.pop("forward", None)
        # transformers' own switch knows whole layers only, so both kinds are set here.
        if chosen == "selective":
            _checkpoint(layer.self_attn, on_host=False)
        elif chosen in ("full", "offload"):
            _checkpoint(layer, on_host=chosen == "offload")


def layer_modes(mode: str | Sequence[str], layers: int) -> list[str]:
    """Return one mode for each layer. Raises: ValueError as `set_activation_checkpointing`.

    >>> layer_modes("full", 2)
    ['full', 'full']
    """
    modes = [mode] * layers if isinstance(mode, str) else list(mode)
    for chosen in modes:
        if chosen not in MODES:
            raise UserError(f"`activation_checkpointing={chosen!r}` is not known. Expected one of {', '.join(MODES)}")
    if len(modes) != layers:
        raise UserError(f"`activation_checkpointing`: {len(modes)} modes for {layers} layers. Give one for each")
    return modes


def _checkpoint(module: nn.Module, on_host: bool) -> None:
    module.forward = partial(_checkpointed, module, on_host)


def _checkpointed(module: nn.Module, on_host: bool, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    if not module.training or has_cache(kwargs):  # which running again would fill a second time
        return forward(*args, **kwargs)
    if not args:  # `checkpoint` keeps random states of the devices of positional tensors only; the CPU's always
        args = (kwargs.pop("hidden_states"),)  # transformers gives attention its input by keyword
    # Of a checkpoint, these hooks see nothing but the tensors among `args`: what it saves to run again with.
    hooks: AbstractContextManager[Any] = kept_on_host() if on_host and _on_gpu(args) else nullcontext()
    with hooks:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in args)
