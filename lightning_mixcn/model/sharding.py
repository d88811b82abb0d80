"""FSDP2 of a 4-bit Mixtral: every parameter is cut along its first dimension, in groups that are gathered together.

A decoder layer is a group, and so are the embedding and the head; the final norm belongs to the rest. Codes, scales and
LoRA's float32 masters lie in one group in their own types: nothing is cast, and gradients are reduced in float32
(Zhao et al. 2023, https://arxiv.org/abs/2304.11277; SimpleFSDP's per-parameter sharding is torch's `fully_shard`).
"""

from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .local_rows import local_rows
from .mixtral import base_of


def shard_model(model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool = True, prefetch: int = 1) -> None:
    """Shard a model in place; on the meta device, before anything is allocated, or with its weights.

    Args:
        model: A Mixtral of `load_mixtral` or the PeftModel around it.
        mesh: One dimension: ranks that share the parameters. Two: ranks that replicate × ranks that share (HSDP).
        reshard_after_forward: Free a layer's gathered parameters between forward and backward, and gather them again:
            less memory for 1.5 times the traffic.
        prefetch: Layers that are gathered ahead of the one that computes.
    """
    base = base_of(model)
    layers = list(base.model.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    if base.config.tie_word_embeddings:
        fully_shard([base.model.embed_tokens, base.lm_head], mesh=mesh)
    else:
        fully_shard(base.model.embed_tokens, mesh=mesh)
        fully_shard(base.lm_head, mesh=mesh)
    # The root is the decoder and not the PeftModel: PEFT calls the model's `forward` past torch's hooks.
    decoder_class = type(base.model)
    fully_shard(base.model, mesh=mesh)
    # transformers looks up by the class's full name which outputs it records, router logits among them, and torch has
    # given the decoder a class of another name.
    type(base.model).__module__, type(base.model).__qualname__ = decoder_class.__module__, decoder_class.__qualname__
    for index, layer in enumerate(layers):
        ahead = cast(list[FSDPModule], layers[index + 1 : index + 1 + prefetch])
        cast(FSDPModule, layer).set_modules_to_forward_prefetch(ahead)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def set_gradient_sync(model: nn.Module, wanted: bool) -> None:
    """Reduce gradients over ranks after the next backward, or (while micro-batches accumulate) keep them local.

    Local gradients are those of whole adapters, not of a share.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(wanted, recurse=False)


def local_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds."""
    return sum(local_rows(parameter)[0].nbytes for parameter in model.parameters())
