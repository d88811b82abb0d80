"""Attention within documents, without a mask of ``[S, S]``.

transformers isolates the documents of a row with a dense mask; that costs the products of the whole square, and on the
CPU torch's slow masked path. Here every document is one causal call, so work and memory follow its own length; where
torch has one call for all documents of a batch, that is used, see `packed_attention`.
"""

from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_mixcn.model.architectures.record import head_size

from .cpu import causal_attention
from .packed import (
    PackedDocuments,
    document_starts,
    pack_documents,
    packed_attention,
    serves,
)

NAME = "document_sdpa"
# Rows that have a document at (start, stop).
Spans = dict[tuple[int, int], list[int]]
Documents = PackedDocuments | Spans


def locate_documents(position_ids: Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> Documents | None:
    """Locate the documents of a batch for the ``documents`` of every layer; waits for the device once.

    Args:
        position_ids: ``[B, S]`` int64.
        config: The model's.
        dtype: Compute dtype.

    Returns:
        The form for the device; ``None`` where transformers' masks are needed: on the CPU, for a sliding window that is
        shorter than a row.
    """
    if serves(position_ids.device, dtype, head_size(config)) and not config.attention_dropout:
        return pack_documents(position_ids)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < position_ids.shape[1]:
        return None
    return document_spans(position_ids)


def document_spans(position_ids: Tensor) -> Spans:
    """Return the spans of a batch's documents: a document begins wherever positions do not go on by one.

    Args:
        position_ids: ``[B, S]`` int64; read on the host, once a forward pass.

    Returns:
        For each ``(start, stop)`` the rows that have a document there.
    """
    rows, length = position_ids.shape
    starts = document_starts(position_ids)
    spans: Spans = defaultdict(list)
    for row, row_starts in enumerate(starts.cpu()):
        bounds = [*row_starts.nonzero().flatten().tolist(), length]
        for start, stop in pairwise(bounds):
            spans[start, stop].append(row)
    assert sum(len(found) * (stop - start) for (start, stop), found in spans.items()) == rows * length
    return spans


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within documents; transformers calls this function.

    Args:
        module: The model's attention.
        query: ``[B, heads, S, head size]``.
        key: ``[B, key-value heads, S, head size]``.
        value: Values, of the shape of ``key``.
        attention_mask: Used only without ``documents``.
        documents: From `locate_documents`; ``None`` (generation, say) is transformers' own SDPA.
        scaling: Factor of the products.
        dropout: Probability.
        kwargs: Further arguments of transformers.

    Returns:
        ``[B, S, heads, head size]``, and no weights.
    """
    if documents is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    if isinstance(documents, PackedDocuments):
        return packed_attention(query, key, value, documents, scaling, kwargs.get("sliding_window")), None
    batch, heads, length, size = query.shape
    output = query.new_empty(batch, length, heads, size)
    pieces = []
    for (start, stop), rows in documents.items():
        index: Any = slice(None) if len(rows) == batch else rows
        q, k, v = (states[index, :, start:stop] for states in (query, key, value))
        attended = _causal(q, k, v, scaling, dropout)
        if len(documents) == 1:
            return attended.transpose(1, 2), None
        pieces.append((index, start, stop, attended.transpose(1, 2)))
    for index, start, stop, attended in pieces:
        output[index, start:stop] = attended
    return output, None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and dropout == 0.0:
        return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
    )


def no_mask(device: torch.device) -> Tensor:
    """Return a mask that keeps transformers from building one: it takes any 4-D tensor for one that is ready."""
    return torch.empty(0, 0, 0, 0, device=device)


ALL_ATTENTION_FUNCTIONS.register(NAME, document_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
