"""Causal attention in bfloat16 on a CPU, as products of blocks: about a quarter less time than torch's fused kernel.

A block of queries is multiplied with all keys up to its end. Scores and softmax are float32, since a score rounded to
bfloat16 would be off by up to 1/512 of itself; probabilities and all other products are bfloat16. Nothing of
``[S, S]`` is kept: backward computes the probabilities again.

Legend: B rows, J key-value heads, G query heads of a key-value head, N = B·J, S positions, D head size; of a block: C
key-value heads, Q = G times its positions, L keys up to its end.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_POSITIONS = 64
# Scores of a block: with their bfloat16 copies they should stay in a core's caches.
_SCORES = 2**20


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend from each position to itself and those before it.

    Args:
        query: ``[B, J·G, S, D]`` bfloat16 on the CPU.
        key: ``[B, J, S, D]``.
        value: Values, of the shape of ``key``.
        scale: Factor of the products, usually ``D ** -0.5``.

    Returns:
        ``[B, J·G, S, D]``.
    """
    attended: Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return attended


class _Block(NamedTuple):
    """Some positions of some heads.

    Args:
        queries: Index of them in ``[N, G, S, D]``.
        keys: Index in ``[N, S, D]`` of the keys that they attend to.
        size: C, G and the number of positions.
    """

    queries: tuple[slice, slice, slice]
    keys: tuple[slice, slice]
    size: tuple[int, int, int]


class _Heads(NamedTuple):
    """Contiguous inputs: queries ``[N, G, S, D]``, keys and values ``[N, S, D]``, keys times the scale in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    scaled: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, scale: float) -> "_Heads":
        k, v = (states.flatten(0, 1).contiguous() for states in (key, value))
        q = query.reshape(len(k), -1, *query.shape[2:]).contiguous()
        return cls(q, k, v, k.float().mul_(scale))

    def blocks(self) -> Iterator[_Block]:
        """Yield all blocks, the shortest first within their heads."""
        count, group, length, _ = self.q.shape
        at_once = max(1, _SCORES // (group * min(length, _POSITIONS) * length))
        for head in range(0, count, at_once):
            heads = slice(head, min(head + at_once, count))
            for start in range(0, length, _POSITIONS):
                stop = min(start + _POSITIONS, length)
                size = (heads.stop - head, group, stop - start)
                yield _Block((heads, slice(None), slice(start, stop)), (heads, slice(stop)), size)

    def queries(self, block: _Block, states_NGSD: Tensor) -> Tensor:
        """Return the block's part of a tensor shaped as the queries, ``[C, Q, D]``."""
        return states_NGSD[block.queries].flatten(1, 2)

    def probabilities(self, block: _Block) -> Tensor:
        """Compute the probabilities, float32 ``[C, Q, L]``."""
        scores_CQL = torch.bmm(self.queries(block, self.q).float(), self.scaled[block.keys].mT)
        width = block.size[2]
        future = torch.full((width, width), float("-inf")).triu_(1)
        scores_CQL.view(*block.size, -1)[..., -width:].add_(future)
        return scores_CQL.softmax(-1)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        heads = _Heads.of(query, key, value, scale)
        attended_NGSD = torch.empty_like(heads.q)
        for block in heads.blocks():
            attended_CQD = torch.bmm(heads.probabilities(block).bfloat16(), heads.v[block.keys])
            attended_NGSD[block.queries] = attended_CQD.view(*block.size, -1)
        return attended_NGSD.view(query.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        heads = _Heads.of(query, key, value, ctx.scale)
        grad_NGSD, dq_NGSD = grad.reshape(heads.q.shape), torch.empty_like(heads.q)
        dk_NSD, dv_NSD = torch.zeros_like(heads.scaled), torch.zeros_like(heads.scaled)
        for block in heads.blocks():
            grad_CQD = heads.queries(block, grad_NGSD)
            p_CQL = heads.probabilities(block)
            dv_NSD[block.keys] += torch.bmm(p_CQL.bfloat16().mT, grad_CQD)
            dp_CQL = torch.bmm(grad_CQD, heads.v[block.keys].mT).float()
            ds_CQL = torch.ops.aten._softmax_backward_data(dp_CQL, p_CQL, -1, torch.float32).bfloat16()
            dk_NSD[block.keys] += torch.bmm(ds_CQL.mT, heads.queries(block, heads.q))
            dq_CQD = torch.bmm(ds_CQL, heads.k[block.keys]).mul_(ctx.scale)
            dq_NGSD[block.queries] = dq_CQD.view(*block.size, -1)
        dk, dv = (total.to(key.dtype).view(key.shape) for total in (dk_NSD.mul_(ctx.scale), dv_NSD))
        return dq_NGSD.view(query.shape), dk, dv, None
