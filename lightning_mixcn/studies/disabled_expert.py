"""A model with one expert disabled: the definition of both modes, and the plain way to run a model so.

Legend: T tokens, E experts, K experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mixcn.model.experts import Router

Mode = Literal["mask", "zero"]
MODES: tuple[Mode, ...] = ("mask", "zero")


class DisabledExpert(NamedTuple):
    """One expert of some layer, and how it is disabled.

    Args:
        mode: ``mask`` or ``zero``, see `disabled_routing`.
        expert: Number of the expert in its layer, from 0.
    """

    mode: Mode
    expert: int


def disabled_routing(
    logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, disabled: DisabledExpert
) -> tuple[Tensor, Tensor]:
    """Route tokens as if an expert were disabled.

    ``mask``: its logit is −∞ before the softmax, so another expert takes its place, and the weights of the chosen ones
    sum to 1 again. ``zero``: its weight is 0 and nothing takes its place, so its output is dropped and the weights of
    the others stay as they were. A token that did not choose the expert is routed as before in both modes.

    Args:
        logits_TE: ``[T, E]`` router logits, any float dtype.
        weights_TK: ``[T, K]`` float32 routing weights that sum to 1.
        index_TK: ``[T, K]`` int64, the chosen experts.
        disabled: What is disabled.

    Returns:
        Weights ``[T, K]`` float32 and experts ``[T, K]`` int64.
    """
    is_disabled_TK = index_TK == disabled.expert
    if disabled.mode == "zero":
        return weights_TK.masked_fill(is_disabled_TK, 0.0), index_TK
    top_k = index_TK.shape[1]
    assert top_k < logits_TE.shape[1], "no expert is left to take the place of the masked one"
    masked_TE = logits_TE.float().clone()
    masked_TE[:, disabled.expert] = -torch.inf
    new_TK, new_index_TK = torch.topk(masked_TE.softmax(dim=-1), top_k, dim=-1)
    chose_it_T1 = is_disabled_TK.any(dim=1, keepdim=True)
    weights_TK = torch.where(chose_it_T1, new_TK / new_TK.sum(dim=-1, keepdim=True), weights_TK)
    return weights_TK, torch.where(chose_it_T1, new_index_TK, index_TK)


def check_modes(modes: tuple[Mode, ...], num_experts: int, top_k: int) -> None:
    """Refuse a mode that a model has too few experts for. Raises: ValueError."""
    if "mask" in modes and top_k >= num_experts:
        raise ValueError(
            f"`mode=mask` needs an expert to take the masked one's place, but each token already goes to {top_k} of "
            f"the model's {num_experts}. Use mode zero"
        )


@contextmanager
def disabled_expert(model: nn.Module, layer: int, disabled: DisabledExpert) -> Iterator[None]:
    """Run a model with an expert disabled: the whole of it, whatever it is asked for, benchmarks included.

    Args:
        model: A Mixtral of `load_mixtral` or the PeftModel around it.
        layer: The layer of the expert, from 0.
        disabled: The expert and the mode.

    Raises:
        ValueError: the model has no such layer or expert, or too few experts for the mode.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not 0 <= layer < len(routers):
        raise ValueError(f"`layer={layer}`: the model has layers 0 to {len(routers) - 1}")
    router = routers[layer]
    if not 0 <= disabled.expert < router.num_experts:
        raise ValueError(f"`expert={disabled.expert}`: the layer has experts 0 to {router.num_experts - 1}")
    check_modes((disabled.mode,), router.num_experts, router.top_k)

    def reroute(_router: nn.Module, _inputs: Any, routing: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return routing[0], *disabled_routing(*routing, disabled)

    handle = router.register_forward_hook(reroute)
    try:
        yield
    finally:
        handle.remove()
