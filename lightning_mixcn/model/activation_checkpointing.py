"""What is kept for the backward pass and what is computed again."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralDecoderLayer

MODES = ("none", "selective", "full")


def set_activation_checkpointing(model: nn.Module, mode: str) -> None:
    """Choose between memory and recomputation.

    Args:
        model: The model (or the PeftModel around it).
        mode: ``none``: every activation is kept (the expert block still keeps only its input and two projections).
            ``selective``: attention is computed again, the experts' products are kept: they are most of the arithmetic.
            ``full``: only each layer's input is kept and the layer runs again in backward.

    Raises:
        ValueError: any other ``mode``.
    """
    if mode not in MODES:
        raise ValueError(f"`activation_checkpointing={mode!r}` is not known. Expected one of {', '.join(MODES)}")
    target = {"none": (), "selective": (MixtralAttention,), "full": (MixtralDecoderLayer,)}[mode]
    for module in model.modules():
        if isinstance(module, MixtralAttention | MixtralDecoderLayer):
            module.__dict__.pop("forward", None)
            if isinstance(module, target):
                # transformers' own switch knows whole layers only, so both modes are set here.
                module.forward = partial(_checkpointed, module)  # type: ignore[method-assign]  # on purpose, see above


def _checkpointed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    if not module.training or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
