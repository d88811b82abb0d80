"""What is kept for the backward pass and what is computed again."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from .host_copies import kept_on_host

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
    layers = [module for module in model.modules() if isinstance(module, MixtralDecoderLayer)]
    for layer, chosen in zip(layers, layer_modes(mode, len(layers)), strict=True):
        for module in (layer, layer.self_attn):
            module.__dict__.pop("forward", None)
        # transformers' own switch knows whole layers only, so both kinds are set here.
        if chosen == "selective":
            _checkpoint(layer.self_attn, on_host=False)
        elif chosen in ("full", "offload"):
            _checkpoint(layer, on_host=chosen == "offload")


def layer_modes(mode: str | Sequence[str], layers: int) -> list[str]:
    """One mode for each layer. Raises: ValueError as `set_activation_checkpointing`.

    >>> layer_modes("full", 2)
    ['full', 'full']
    """
    modes = [mode] * layers if isinstance(mode, str) else list(mode)
    for chosen in modes:
        if chosen not in MODES:
            raise ValueError(f"`activation_checkpointing={chosen!r}` is not known. Expected one of {', '.join(MODES)}")
    if len(modes) != layers:
        raise ValueError(f"`activation_checkpointing`: {len(modes)} modes for {layers} layers. Give one for each")
    return modes


def _checkpoint(module: nn.Module, on_host: bool) -> None:
    module.forward = partial(_checkpointed, module, on_host)


def _checkpointed(module: nn.Module, on_host: bool, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    if not module.training or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    if not args:  # `checkpoint` keeps random states of the devices of positional tensors only; the CPU's always
        args = (kwargs.pop("hidden_states"),)  # transformers gives attention its input by keyword
    # Of a checkpoint, these hooks see nothing but the tensors among `args`: what it saves to run again with.
    hooks: AbstractContextManager[Any] = kept_on_host() if on_host and _on_gpu(args) else nullcontext()
    with hooks:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in args)
