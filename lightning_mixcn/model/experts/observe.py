"""Observe the routers of a model: the experts of each token.

Legend: T tokens, E experts, K experts a token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixcn.errors import UserError

from .block import Router

Observer = Callable[[int, Tensor, Tensor, Tensor], None]


def is_recomputing() -> bool:
    """Tell if this forward is activation checkpointing's second one, inside a backward pass.

    torch has no public way to ask. The engine numbers each backward pass while it runs, and gives -1 otherwise; this
    holds for reentrant checkpoints and for the others.
    """
    return torch._C._current_graph_task_id() != -1


_paused = False


@contextmanager
def unobserved() -> Iterator[None]:
    """Keep a forward pass from all observers, such as one of the base beside a batch that is counted."""
    global _paused
    _paused = True
    try:
        yield
    finally:
        _paused = False


def observe_routing(model: nn.Module, observer: Observer) -> ExitStack:
    """Call an observer with every routing decision, once each: not for recomputation in backward.

    Args:
        model: A model of `load_moe`, as it is or inside a PeftModel, sharded or not.
        observer: Called without gradients, with the layer's number from 0, router logits ``[T, E]`` in the compute
            dtype, routing weights ``[T, K]`` float32, and chosen experts ``[T, K]`` int64. T is all positions of the
            batch, padding included, row by row. The tensors are detached and are the model's own: do not change them.

    Returns:
        A context manager; leaving it, or its ``close()``, ends the observation.

    Raises:
        ValueError: the model has no router.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise UserError(f"`model` is a {type(model).__name__} without a Router. Give a model made by `load_moe`")
    observation = ExitStack()
    for layer, router in enumerate(routers):
        handle = router.register_forward_hook(partial(_tell, observer, layer))
        observation.callback(handle.remove)
    return observation


def _tell(observer: Observer, layer: int, _router: nn.Module, _inputs: Any, routing: tuple[Tensor, ...]) -> None:
    if _paused or is_recomputing():
        return
    logits_TE, weights_TK, index_TK = (part.detach() for part in routing)
    with torch.no_grad():
        observer(layer, logits_TE, weights_TK, index_TK)
