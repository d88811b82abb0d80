"""Start LoRA from what NF4 rounds off: s·B A is the best approximation of W − NF4(W) that its rank allows.

LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659) with one iteration, for attention and every expert: NF4(W)
stays as it is. A matrix is read from the high-precision base, rounded and approximated alone. Ranks do not communicate:
each computes the factors of those matrices of whose factors it holds rows.

The factors belong to NF4(W). On disk they are [A; A₀] and [B, −B₀], which is plain LoRA for W: other tools, and merging
onto W, add what was trained, and not the correction of a rounding that is not there.

Legend: G groups (experts, or 1), R rank, Q = columns of the search.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.layout import StoredWeight
from lightning_mixcn.model.checkpoints.reading import is_quantised
from lightning_mixcn.model.nf4.codec import SUPERBLOCK, dequantize_nf4, quantize_nf4
from lightning_mixcn.model.sharding import local_shard

from .attach import LoraFrozenLinear

LoraStart = Literal["rounding_error"]

# What rounding leaves is almost noise: its singular values fall slowly, and few passes miss some of the largest. Eight
# find 97 % of what the best factors of rank 64 would, for a matrix of 14,336 x 4,096 normal values.
_PASSES = 8


def check_start(checkpoint: Checkpoint, quantization: str, *, has_lora: bool, has_adapter: bool) -> None:
    """Refuse a start from the rounding error where there is none. Raises: ValueError."""
    start = "`lora_start='rounding_error'`"
    if not has_lora:
        raise UserError(f"{start} is a start of LoRA, but `lora` is null. Set lora, or leave lora_start out")
    if has_adapter:
        raise UserError(f"{start}, but `adapter` brings its own factors. Leave out one of the two")
    if quantization != "nf4":
        raise UserError(
            f"{start}, but `quantization={quantization!r}` rounds nothing. Set nf4, or leave lora_start out"
        )
    if is_quantised(checkpoint):
        raise UserError(
            f"{start} needs the high-precision base, but {checkpoint.path} holds 4-bit weights, which do not say what "
            "was rounded off. Give the folder that it was made from as `base`"
        )


@torch.no_grad()
def start_from_rounding_error(layer: LoraFrozenLinear, entry: StoredWeight, checkpoint: Checkpoint) -> None:
    """Give a layer's active adapter its start, and have the layer keep it, see `LoraFrozenLinear.start`.

    Args:
        layer: LoRA layer around a weight that NF4 rounds; each rank fills its shard.
        entry: The weight's place in the checkpoint.
        checkpoint: High-precision base.
    """
    (adapter,) = layer.active_adapters
    for group in layer.held_groups(adapter):
        a, b = best_factors(rounding_error(entry, checkpoint, group, layer.device), layer.r[adapter])
        layer.write_group(adapter, group, a, b / layer.scaling[adapter])
    layer.start = tuple(local_shard(weight)[0].cpu().clone() for weight in layer.weights(adapter))


def rounding_error(entry: StoredWeight, checkpoint: Checkpoint, group: int, device: torch.device) -> Tensor:
    """Return W − NF4(W) of one matrix, ``[out, in]`` float32, as it is in a model that holds the stack in 4 bits."""
    groups, rows, columns = entry.shape
    first, last = group * rows * columns, (group + 1) * rows * columns
    start = first // SUPERBLOCK * SUPERBLOCK  # superblocks may reach over to the neighbours
    stop = min(-(-last // SUPERBLOCK) * SUPERBLOCK, groups * rows * columns)
    values = checkpoint.read_segments(entry.segments, start, stop).to(device)
    rounded = dequantize_nf4(quantize_nf4(values), torch.float32)[: len(values)]
    return (values.float() - rounded)[first - start : last - start].view(rows, columns)


def best_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``A [R, in]`` and ``B [out, R]`` of which B A is next to the best approximation of a matrix.

    Subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4), exact where a matrix is not larger than the
    search. `torch.svd_lowrank` draws its start on the device, so that a run that goes on on another one would not find
    the factors again that it has to subtract.

    Args:
        error: ``[out, in]`` float32.
        rank: R, at most the smaller of both.
    """
    width = min(2 * rank, *error.shape)
    search_IQ = torch.randn(error.shape[1], width, generator=torch.Generator().manual_seed(0)).to(error.device)
    for _ in range(_PASSES):
        search_OQ = torch.linalg.qr(error @ search_IQ).Q
        search_IQ = torch.linalg.qr(error.mT @ search_OQ).Q
    left, values, right = torch.linalg.svd(error @ search_IQ, full_matrices=False)
    a, b = torch.zeros(rank, error.shape[1]), torch.zeros(len(error), rank)
    found, roots = min(rank, width), values[:rank].sqrt()
    a[:found] = roots[:, None] * (right[:rank] @ search_IQ.mT)
    b[:, :found] = left[:, :rank] * roots
    return a, b
