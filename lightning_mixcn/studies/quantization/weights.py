"""The weights that NF4 rounds, as each format holds them: their bits, and how far they are from the checkpoint's.

Legend: n weights of a piece, flattened.
"""

import math
from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from lightning_mixcn.model.causal_lm import bytes_in_memory
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.layout import StoredWeight, stored_weights
from lightning_mixcn.model.checkpoints.reading import model_config, pieces
from lightning_mixcn.model.memory.counts import count_parameters
from lightning_mixcn.model.nf4 import codec as nf4
from lightning_mixcn.model.nf4.storage import NF4Weight, Weight


class Sizes(NamedTuple):
    """What a format takes.

    Args:
        bytes: Bytes of all weights.
        weights: Number of weights.
        quantised_bytes: Bytes of those that NF4 rounds (attention's projections and experts).
        quantised_weights: Number of these.
    """

    bytes: int
    weights: int
    quantised_bytes: int
    quantised_weights: int


def rounded_names(checkpoint: Checkpoint) -> list[str]:
    """Return names of the modules that NF4 rounds, in the model's order."""
    return [entry.name for entry in rounded_entries(checkpoint)]


def rounded_entries(checkpoint: Checkpoint) -> list[StoredWeight]:
    """Return those weights of a model of any format, and where the checkpoint has them."""
    return [entry for entry in stored_weights(model_config(checkpoint), checkpoint) if entry.is_rounded]


def sizes_in_memory(model: nn.Module, checkpoint: Checkpoint) -> Sizes:
    """Return the sizes of a model of `load_moe` without adapters."""
    rounded = [_storage(model, entry) for entry in rounded_entries(checkpoint)]
    quantised = sum(parameter.nbytes for storage in rounded for parameter in storage.parameters())
    weights = sum(prod(storage.shape) for storage in rounded)
    return Sizes(sum(bytes_in_memory(model).values()), count_parameters(model)["total"], quantised, weights)


def single_sizes(model: nn.Module, checkpoint: Checkpoint) -> Sizes:
    """Return a dense model's sizes as `round_singly` rounds it: two weights a byte, and a float32 for 64 of them."""
    dense = sizes_in_memory(model, checkpoint)
    numels = [prod(entry.shape) for entry in rounded_entries(checkpoint)]
    single = sum(-(-numel // 2) + 4 * -(-numel // nf4.BLOCK) for numel in numels)
    return Sizes(dense.bytes - dense.quantised_bytes + single, dense.weights, single, dense.quantised_weights)


def round_singly(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a dense model the weights of NF4 without double quantisation: float32 absolute maxima of 64 weights each.

    Args:
        model: Model of ``load_moe(quantization="none")``; it stays dense.
        checkpoint: Checkpoint with the unrounded weights.
    """
    device = next(model.parameters()).device
    for entry in rounded_entries(checkpoint):
        for start, values_n in pieces(entry, checkpoint):
            packed, state = bnb.quantize_4bit(values_n.to(device), blocksize=nf4.BLOCK, quant_type="nf4")
            _storage(model, entry).write(start, bnb.dequantize_4bit(packed, state).flatten())


def relative_error(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    """Return the norm of all rounded weights' differences from the checkpoint's, over the norm of the weights.

    Args:
        model: Model of any format.
        checkpoint: Checkpoint with the unrounded weights.
        dtype: As which the model computes with its weights.
    """
    rounded = rounded_entries(checkpoint)
    return error_of(
        rounded, checkpoint, lambda entry, start, count: _decoded(_storage(model, entry), start, count, dtype)
    )


def error_of(
    rounded: list[StoredWeight], checkpoint: Checkpoint, decoded: Callable[[StoredWeight, int, int], Tensor]
) -> float:
    """Return the same of weights that come from anywhere.

    Args:
        rounded: The weights.
        checkpoint: Checkpoint with the unrounded ones.
        decoded: Gives ``count`` weights of an entry from number ``start`` on, ``[n]``.
    """
    squares = [part for entry in rounded for part in _squares(entry, checkpoint, decoded)]
    return math.sqrt(math.fsum(wrong for wrong, _ in squares) / math.fsum(all_of for _, all_of in squares))


def _squares(
    entry: StoredWeight, checkpoint: Checkpoint, decoded: Callable[[StoredWeight, int, int], Tensor]
) -> Iterator[tuple[float, float]]:
    for start, values_n in pieces(entry, checkpoint):
        exact_n = values_n.float()
        wrong_n = decoded(entry, start, len(values_n)).cpu().float() - exact_n
        yield float(wrong_n.square().sum(dtype=torch.float64)), float(exact_n.square().sum(dtype=torch.float64))


def _storage(model: nn.Module, entry: StoredWeight) -> Weight:
    storage: Weight = model.get_submodule(entry.name).storage  # type: ignore[assignment]  # a FrozenLinear
    return storage


def _decoded(storage: Weight, start: int, count: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(storage, NF4Weight):
        return storage.values.detach().flatten()[start : start + count]
    rows = slice(start // nf4.SUPERBLOCK, nf4.superblocks(start + count))
    tensors = (storage.codes, storage.scales, storage.super_scale, storage.super_offset)
    return nf4.dequantize_nf4(nf4.NF4Tensors(*(tensor.detach()[rows] for tensor in tensors)), dtype)[:count]
