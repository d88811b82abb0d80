"""Parameters that should train, expert by expert, and the gradients that arrive there.

Legend: G groups (the experts of a stack, or 1), T tokens, H hidden, E experts, K experts a token.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.checkpoints.layout import disk_names
from lightning_mixcn.model.experts.block import Experts
from lightning_mixcn.model.sharding import local_shard

from .adapter_file import EMBEDDINGS
from .attach import lora_layers


@dataclass(frozen=True)
class TrainedTensor:
    """A parameter that should train.

    Args:
        names: Names of the groups in adapter files.
        parameter: Its rows are those of the groups, one after the other.
        experts: The block whose experts the groups are; ``None`` for what every token goes through.
        after: LoRA's B for an A, which has no gradient while B is 0.
        numbers: Numbers of the groups among `experts`.
    """

    names: list[str]
    parameter: Tensor
    experts: Experts | None = None
    after: Tensor | None = None
    numbers: Sequence[int] = ()


def trained_tensors(model: nn.Module, train_embeddings: bool) -> Iterator[TrainedTensor]:
    """Yield the factors of the active adapters, and embedding and head on request, even if they require no gradient.

    Args:
        model: A `MoeForCausalLM`, or the PeftModel around it.
        train_embeddings: As in `load_moe`.
    """
    base: Any = base_of(model)
    for name, layer in lora_layers(model):
        parent = base.get_submodule(name.rpartition(".")[0])
        experts = parent if isinstance(parent, Experts) else None
        of_groups, numbers = disk_names(base.architecture, name, layer.groups), list(layer.slots)
        names = [of_groups[number] for number in numbers]
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                a, b = (cast(nn.Linear, factors[adapter]).weight for factors in (layer.lora_A, layer.lora_B))
                yield TrainedTensor([f"{group}.lora_B" for group in names], b, experts, numbers=numbers)
                yield TrainedTensor([f"{group}.lora_A" for group in names], a, experts, after=b, numbers=numbers)
    if train_embeddings:
        weights = {name: base.get_submodule(name).weight for name in EMBEDDINGS}
        for name in list({id(weight): name for name, weight in reversed(weights.items())}.values()):  # once if tied
            yield TrainedTensor([name], weights[name])


@torch.no_grad()
def nonzero_groups(tensor: Tensor, groups: int) -> Tensor:
    """Tell which groups of rows have anything but zeros in this rank's shard.

    Args:
        tensor: ``[G·n, columns]``, perhaps a DTensor.
        groups: G.

    Returns:
        ``[G]`` int64, 0 or 1; NaN is not zero.
    """
    held, first = local_shard(tensor)
    rows = len(tensor) // groups
    bounds = [min(max(group * rows - first, 0), len(held)) for group in range(groups + 1)]
    return torch.stack([held[start:stop].any() for start, stop in pairwise(bounds)]).long()


class GradientArrivals:
    """Counter, while it is `counting`, of each expert's rows whose result a gradient has come back to.

    That is what an expert's adapter learns from: not from padding, nor in the last layer from tokens without a label.

    Args:
        model: A model of `load_moe`, as it is or inside a PeftModel.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counting = False
        self._counts: dict[Experts, Tensor] = {}
        self._hooks = ExitStack()
        for module in model.modules():
            if isinstance(module, Experts):
                self._hooks.callback(module.register_forward_hook(self._watch).remove)

    def take(self) -> dict[Experts, Tensor]:
        """Return ``[E]`` int64 of each block that a gradient has come back to since the last call, on this rank."""
        counts, self._counts = self._counts, {}
        return counts

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def _watch(self, experts: nn.Module, inputs: tuple[Tensor, ...], output_TH: Tensor) -> None:
        # What activation checkpointing computes a second time is no part of the graph, so no gradient comes back to it.
        if self.counting and output_TH.requires_grad:
            count = partial(self._count, cast(Experts, experts), inputs[1].detach())
            output_TH.register_hook(count)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _count(self, experts: Experts, index_TK: Tensor, grad_TH: Tensor) -> None:
        arrived_T = (grad_TH != 0).any(dim=1)
        groups = experts.gate_proj.groups
        counts_E = self._counts.setdefault(experts, torch.zeros(groups, dtype=torch.int64, device=grad_TH.device))
        counts_E.index_add_(0, index_TK.flatten(), arrived_T.repeat_interleave(index_TK.shape[1]).long())


_WORD_BYTES = 8
# Words that one sum covers; sums are then weighted by their place, so that exchanged chunks are noticed, too.
_CHUNK_WORDS = 1024


@torch.no_grad()
def fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """Fingerprint this rank's shard of each tensor.

    The bytes are added up as 64-bit integers, exactly, so any change of one word changes the sum. A 4-bit Mixtral-8x7B
    is 24 GB: some 10 ms on a GPU, a few seconds on a CPU.

    Args:
        tensors: Tensors of any dtypes, on one device or several; sharded ones are not gathered.

    Returns:
        ``[N]`` int64 on the CPU, read in one transfer a device.
    """
    sums = [_fingerprint(local_shard(tensor)[0]) for tensor in tensors]
    result = torch.zeros(len(sums), dtype=torch.int64)
    for device in {value.device for value in sums}:
        here = [index for index, value in enumerate(sums) if value.device == device]
        result[here] = torch.stack([sums[index] for index in here]).cpu()
    return result


def _fingerprint(tensor: Tensor) -> Tensor:
    bytes_N = tensor.contiguous().view(-1).view(torch.uint8)
    if bytes_N.storage_offset() % _WORD_BYTES:  # not aligned to words
        return bytes_N.sum(dtype=torch.int64)
    words = bytes_N.numel() // _WORD_BYTES
    body_N, rest_N = bytes_N[: words * _WORD_BYTES].view(torch.int64), bytes_N[words * _WORD_BYTES :]
    whole = words // _CHUNK_WORDS * _CHUNK_WORDS
    # Odd weights lose no bit modulo 2⁶⁴.
    sums = body_N[:whole].view(-1, _CHUNK_WORDS).sum(1)
    weights = torch.arange(len(sums), device=tensor.device) * 2 + 1
    return (sums * weights).sum() - body_N[whole:].sum() + rest_N.sum(dtype=torch.int64) * 3
