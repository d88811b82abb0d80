"""Mixtral's attention with few passes for what transformers does in many: projections, and rotation by positions.

Legend: B rows, S positions, H hidden, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from lightning_mixcn.model.kernels import has_triton

from .packed import PackedDocuments, packed_attention
from .projections import can_fuse, project_output, project_states


class FusedAttention(MixtralAttention):
    """transformers' attention, whose RoPE (Su et al. 2021, https://arxiv.org/abs/2104.09864) is Triton's on CUDA.

    Step by step, as transformers has it, RoPE moves 20 bytes a number of q and k forward and 34 backward, in 10 and 16
    kernels; fused it moves 4 and 4, in one kernel each. It is used where documents are packed for one call, in training
    and in evaluation with labels. There, projections in 4 bits are products with LoRA inside, see `projections`.
    Elsewhere, and without Triton, this is transformers' attention, bit for bit.
    """

    def forward(  # type: ignore[override]  # releases of transformers name the cache differently, it is among kwargs
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
        if not isinstance(documents, PackedDocuments) or not _runs_triton(hidden_states):
            attended, weights = super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
            return attended, weights
        inputs: Any = [self.q_proj, self.k_proj, self.v_proj]
        output: Any = self.o_proj
        fuses = can_fuse([*inputs, output])
        if fuses:
            query, key, value = project_states(hidden_states, *position_embeddings, self.head_dim, inputs)
        else:
            heads = *hidden_states.shape[:2], -1, self.head_dim
            query, key, value = (project(hidden_states).view(heads) for project in inputs)
            query, key = _Rotation.apply(query, key, *position_embeddings)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        query, key, value = (state.transpose(1, 2) for state in (query, key, value))
        attended = packed_attention(query, key, value, documents, self.scaling, self.config.sliding_window).flatten(2)
        return project_output(attended, output) if fuses else output(attended), None


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
