"""Attention within documents as one call for a whole batch: torch's flash attention of sequences of any length.

The tokens of all rows follow one another, and offsets say where each document begins. No mask is made, keys are
not repeated for grouped queries, and work and memory follow the documents' own lengths
(FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691).

Legend: B rows, S positions of a row, N = B·S tokens, D documents.
"""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes fewer key heads than query heads without a flag, later releases need it.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class PackedDocuments(NamedTuple):
    """Places of a batch's documents among its tokens, row after row.

    Args:
        offsets: ``[D + 1]`` int32 on the batch's device: each document's first token, and N.
        longest: Tokens of the longest document.
    """

    offsets: Tensor
    longest: int


def serves(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Tell if `packed_attention` can be used: torch's flash attention needs an Ampere or newer, and 16 bits.

    Args:
        device: Device of the batch.
        dtype: Compute dtype.
        head_size: Width of a head.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_size <= 256
        and head_size % 8 == 0
        and torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def document_starts(position_ids: Tensor) -> Tensor:
    """Mark where documents begin: at the front of a row, and where positions do not go on by one; bool ``[B, S]``."""
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)


def pack_documents(position_ids: Tensor) -> PackedDocuments:
    """Compute the offsets of a batch's documents, for all layers; waits for the device once.

    Args:
        position_ids: ``[B, S]`` int64.
    """
    starts_N = document_starts(position_ids).flatten().cpu()
    offsets = F.pad(starts_N.nonzero().flatten(), (0, 1), value=len(starts_N)).int()
    longest = int(offsets.diff().max())
    return PackedDocuments(offsets.to(position_ids.device, non_blocking=True), longest)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: PackedDocuments,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attend causally within each document.

    Args:
        query: ``[B, heads, S, head size]``, float16 or bfloat16.
        key: ``[B, key-value heads, S, head size]``.
        value: Values, of the shape of ``key``.
        documents: From `pack_documents`.
        scaling: Factor of the products; ``None`` is 1/√head size.
        sliding_window: Tokens that one attends to, itself among them; ``None`` for all before it.

    Returns:
        ``[B, S, heads, head size]``.
    """
    batch, _, length, _ = query.shape
    # The projections made these as [B, S, heads, head size], so each is a view.
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    offsets, longest = documents
    # Torch takes (-1, 0) for causal; a window that no document fills is the same, and slower.
    left = -1 if sliding_window is None or sliding_window >= longest else sliding_window - 1
    window = (left, 0)
    attended: Any = varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=window, **_GROUPED
    )
    return torch.unflatten(attended, 0, (batch, length))
