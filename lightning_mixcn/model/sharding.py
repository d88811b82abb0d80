"""FSDP2 of a 4-bit mixture: every parameter is cut along its first dimension, in groups that are gathered together.

A decoder layer is a group, and so are the embedding and the head; the final norm belongs to the rest. Codes, scales and
LoRA's float32 masters are in one group in their own types: nothing is cast, and gradients are reduced in float32
(Zhao et al. 2023, https://arxiv.org/abs/2304.11277; SimpleFSDP's per-parameter sharding is torch's `fully_shard`).
A sharded parameter is a DTensor; the functions of shards take plain tensors, too, of which a rank has all.
"""

from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard_model(model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool = True, prefetch: int = 1) -> None:
    """Shard a model in place; on the meta device, before anything is allocated, or with its weights.

    Args:
        model: A model of `load_moe` or the PeftModel around it.
        mesh: One dimension: ranks that share the parameters. Two: ranks that replicate × ranks that share (HSDP).
        reshard_after_forward: Free a layer's gathered parameters between forward and backward, and gather them again:
            less memory for 1.5 times the traffic.
        prefetch: Layers that are gathered ahead of the one that computes.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
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
    """Tell if parameters are sharded by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def set_gradient_sync(model: nn.Module, wanted: bool) -> None:
    """Reduce gradients over ranks after the next backward, or (while micro-batches accumulate) keep them local.

    Local gradients are those of whole adapters, not of a share.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(wanted, recurse=False)


def local_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters that this rank has."""
    return sum(local_shard(parameter)[0].nbytes for parameter in model.parameters())


def local_shard(parameter: Tensor) -> tuple[Tensor, int]:
    """Return this rank's shard of a parameter, without autograd, and the number of its first row.

    Args:
        parameter: A plain tensor, or a DTensor that is sharded along its first dimension.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    (dimension,) = (index for index, placement in enumerate(parameter.placements) if placement.is_shard(0))
    # As torch.chunk cuts: every rank has the same number of rows, and the last ones fewer or none.
    rows = -(-len(parameter) // parameter.device_mesh.size(dimension))
    first = min(rows * parameter.device_mesh.get_local_rank(dimension), len(parameter))
    return parameter.to_local().detach(), first


def copy_to_shard(parameter: Tensor, values: Tensor) -> None:
    """Fill this rank's shard of a parameter from the values of all of it."""
    shard, first = local_shard(parameter)
    shard.copy_(values[first : first + len(shard)])


def full_tensor(parameter: Tensor) -> Tensor:
    """Return all of a parameter, without autograd; all ranks must call it where it is sharded."""
    whole: Any = parameter.detach()
    return cast(Tensor, whole.full_tensor() if isinstance(whole, DTensor) else whole)


def shard_elements(parameter: Tensor) -> range:
    """Return the elements of the flattened parameter that are in this rank's shard."""
    shard, first = local_shard(parameter)
    start = first * (parameter.numel() // max(1, len(parameter)))
    return range(start, start + shard.numel())


def write_to_shard(parameter: Tensor, start: int, values: Tensor) -> None:
    """Copy flat values into this rank's shard, from element ``start`` of the parameter on."""
    shard, _ = local_shard(parameter)
    start -= shard_elements(parameter).start
    shard.view(-1)[start : start + values.numel()].copy_(values)
