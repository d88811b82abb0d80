"""Attention of packed documents by a mask over all tokens, in place of torch's kernel for CUDA."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def dense_varlen(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, *given: Any, **options: Any) -> Tensor:
    """Compute `varlen_attn` by a mask over all tokens; the arguments are the same."""
    bound = inspect.signature(varlen_attn).bind(query, key, value, cu_seq_q, *given, **options)
    cu_seq_k, longest, window = (bound.arguments[name] for name in ("cu_seq_k", "max_q", "window_size"))
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert longest == bound.arguments["max_k"] == int(cu_seq_q.diff().max())
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert window[1] == 0, "causal"
    token_N = torch.arange(len(query))
    document_N = torch.bucketize(token_N, cu_seq_q, right=True)
    distance_NN = token_N[:, None] - token_N
    allowed_NN = (document_N[:, None] == document_N) & (distance_NN >= 0)
    if window[0] >= 0:
        allowed_NN &= distance_NN <= window[0]
    repeats = query.shape[1] // key.shape[1]
    queries, keys, values = (
        part.repeat_interleave(count, 1).transpose(0, 1)
        for part, count in ((query, 1), (key, repeats), (value, repeats))
    )
    scale = bound.arguments.get("scale") or query.shape[-1] ** -0.5
    scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~allowed_NN, -torch.inf)
    attended: Tensor = scores.softmax(-1) @ values
    return attended.transpose(0, 1)
