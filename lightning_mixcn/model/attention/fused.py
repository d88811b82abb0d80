"""Attention with few passes for what transformers does in many: projections, and rotation by positions.

Legend: B rows, S positions, H hidden, D head size.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mixcn.model.architectures import Architecture
from lightning_mixcn.model.kernels import has_triton

from .packed import PackedDocuments, packed_attention
from .projections import can_fuse, project_output, project_states


@cache
def fused_attention(architecture: Architecture) -> type[nn.Module]:
    """Return the class of a family's attention."""
    stock = architecture.attention
    return type(f"Fused{stock.__name__}", (FusedAttention, stock), {"__module__": __name__})


if TYPE_CHECKING:  # what it is mixed into
    _Attention = nn.Module
else:
    _Attention = object


class FusedAttention(_Attention):
    """What is added to transformers' attention of a family: RoPE by one Triton kernel on CUDA.

    RoPE: Su et al. 2021, https://arxiv.org/abs/2104.09864.

    Step by step, as transformers has it, RoPE moves 20 bytes a number of q and k forward and 34 backward, in 10 and 16
    kernels; fused it moves 4 and 4, in one kernel each. It is used where documents are packed for one call, in training
    and in evaluation with labels. There, projections in 4 bits are products with LoRA inside, see `projections`.
    Elsewhere, and without Triton, this is transformers' attention, bit for bit.
    """

    config: Any
    head_dim: int
    scaling: float
    o_proj: Any

    def forward(  # releases of transformers name the cache differently, it is among kwargs
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within documents.

        Args:
            hidden_states: ``[B, S, H]``.
            position_embeddings: Cosines and sines, ``[B, S, D]`` or ``[1, S, D]`` in the compute dtype.
            attention_mask: Used by transformers' attention only.
            kwargs: ``documents`` of `locate_documents`, and transformers' arguments, the KV cache among them.

        Returns:
            ``[B, S, H]``, and no weights.
        """
        documents = kwargs.get("documents")
        clips = getattr(self.config, "clip_qkv", None) is not None
        if not isinstance(documents, PackedDocuments) or not _runs_triton(hidden_states) or clips:
            attended, weights = super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
            return attended, weights
        inputs: Any = [self.q_proj, self.k_proj, self.v_proj]
        output: Any = self.o_proj
        fuses, has_norms = can_fuse([*inputs, output]), hasattr(self, "q_norm")
        if fuses:
            angles = None if has_norms else position_embeddings
            query, key, value = project_states(hidden_states, angles, self.head_dim, inputs)
        else:
            heads = *hidden_states.shape[:2], -1, self.head_dim
            query, key, value = (project(hidden_states).view(heads) for project in inputs)
        if has_norms or not fuses:
            query, key = self._normalised("q_norm", query), self._normalised("k_norm", key)
            query, key = _Rotation.apply(query, key, *position_embeddings)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        query, key, value = (state.transpose(1, 2) for state in (query, key, value))
        window = getattr(self.config, "sliding_window", None)
        attended = packed_attention(query, key, value, documents, self.scaling, window).flatten(2)
        return project_output(attended, output) if fuses else output(attended), None

    def _normalised(self, name: str, states: Tensor) -> Tensor:
        """Apply one of attention's own norms to ``[B, S, heads, D]``, as wide as a head or as all of them."""
        norm: Any = getattr(self, name, None)
        if norm is None:
            return states
        rows: Tensor = norm(states.reshape(*states.shape[:2], -1, norm.weight.numel()))
        return rows.view_as(states)


class _Rotation(torch.autograd.Function):
    """Rotation of queries and keys, ``[B, S, heads, D]`` each; of its arguments only the angles are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from lightning_mixcn.model.kernels.rotary import rotate

        ctx.save_for_backward(cos, sin)
        return rotate(query, key, cos, sin)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from lightning_mixcn.model.kernels.rotary import rotate

        cos, sin = ctx.saved_tensors
        return *rotate(dquery.contiguous(), dkey.contiguous(), cos, sin, backwards=True), None, None


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and has_triton()
