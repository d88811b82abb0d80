"""Embedding and output head: float32 masters where they are trained, and a loss that never holds all logits.

Legend: N positions, H hidden, V vocabulary, C positions of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mixcn.model.kernels import has_triton

IGNORED = -100
# Logits of a chunk. On the CPU, 28 MiB of float32: from 32 MiB on glibc maps fresh pages at each allocation, which cost
# a fifth of the loss. On a GPU, 256 MiB: 2,048 rows of 32,000 pieces, whose product of 0.54 TFLOP at a hidden size of
# 4,096 takes an H100 some 0.7 ms and hides the launches of the kernels beside it; 32,768 positions are then 16 chunks
# instead of 147. The logits hold 128 MiB in 16 bits, and without Triton these 256, whatever the number of positions.
_CHUNK_LOGITS = {"cpu": 7 * 2**20, "cuda": 2**26}


def chunk_positions(device_type: str, vocabulary: int) -> int:
    """Return the number of positions whose logits are held at a time."""
    return max(64, _CHUNK_LOGITS.get(device_type, 2**24) // vocabulary // 64 * 64)


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and has_triton() and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


class _TokenNLL(torch.autograd.Function):
    """Negative log-likelihood of each position, chunk by chunk.

    A position's loss depends on its own hidden state only. With a frozen head its gradient for a unit upstream gradient
    is therefore computed in forward, ``[N, H]``, and backward only scales its rows. With a trained head, backward
    computes the logits again.

    `F.linear_cross_entropy` of torch 2.13 does not replace it: for 2,048 positions, a hidden size of 1,024, 32,000
    pieces, float32 and a frozen head, it took 18.4 s and 182 MiB on a shared CPU core where this took 8.6 s and 44 MiB;
    its loss is bfloat16 where the input is; and torch 2.11 does not have it.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, master_VH: Tensor, labels_N: Tensor) -> Tensor:
        chunks = _Chunks(hidden_NH, master_VH, labels_N)
        nll_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_NH.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        unit_NH = torch.empty_like(hidden_NH) if needs_hidden and not needs_weight else None
        for rows in chunks.rows:
            nll_N[rows], dlogits_CV = chunks.evaluate(rows, wants_gradient=unit_NH is not None)
            if unit_NH is not None and dlogits_CV is not None:
                torch.mm(dlogits_CV, chunks.weight_VH, out=unit_NH[rows])
        if unit_NH is None:
            ctx.save_for_backward(hidden_NH, master_VH, labels_N)
        else:
            ctx.save_for_backward(unit_NH)
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if len(ctx.saved_tensors) == 1:
            (unit_NH,) = ctx.saved_tensors
            # Computed in float32 and written in the compute dtype: no copy of all in float32, which `.to` would need.
            return torch.mul(unit_NH, grad_N[:, None], out=torch.empty_like(unit_NH)), None, None
        hidden_NH, master_VH, labels_N = ctx.saved_tensors
        chunks = _Chunks(hidden_NH, master_VH, labels_N)
        dhidden_NH = torch.empty_like(hidden_NH)
        dweight_VH = torch.zeros_like(master_VH, dtype=torch.float32)
        for rows in chunks.rows:
            _, dlogits_CV = chunks.evaluate(rows, wants_gradient=True, grad_C=grad_N[rows])
            assert dlogits_CV is not None
            torch.mm(dlogits_CV, chunks.weight_VH, out=dhidden_NH[rows])
            dweight_VH += dlogits_CV.t() @ hidden_NH[rows]
        return dhidden_NH, dweight_VH.to(master_VH.dtype), None


class _TokenKL(torch.autograd.Function):
    """KL(reference ‖ model) of each position's next-token distributions, chunk by chunk, under one frozen head.

    As in `_TokenNLL` the gradient for a unit upstream gradient, (q − p) W with the model's q and the reference's p, is
    computed in forward. Three tensors of a chunk are float32 at once, so a chunk is a quarter of the loss's.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, reference_NH: Tensor, master_VH: Tensor) -> Tensor:
        assert not ctx.needs_input_grad[2], "the reference has the same head, so it is frozen"
        weight_VH = master_VH.to(hidden_NH.dtype)
        kl_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
        unit_NH = torch.empty_like(hidden_NH)
        size = -(-chunk_positions(hidden_NH.device.type, len(weight_VH)) // 4)
        for start in range(0, len(hidden_NH), size):
            rows = slice(start, start + size)
            log_p_CV, log_q_CV = (
                torch.log_softmax(side_NH[rows] @ weight_VH.t(), 1, dtype=torch.float32)
                for side_NH in (reference_NH, hidden_NH)
            )
            p_CV = log_p_CV.exp()
            kl_N[rows] = log_p_CV.sub_(log_q_CV).mul_(p_CV).sum(1)
            torch.mm(log_q_CV.exp_().sub_(p_CV).to(hidden_NH.dtype), weight_VH, out=unit_NH[rows])
        ctx.save_for_backward(unit_NH)
        return kl_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (unit_NH,) = ctx.saved_tensors
        return torch.mul(unit_NH, grad_N[:, None], out=torch.empty_like(unit_NH)), None, None


class _Chunks:
    """The positions in chunks, and the buffers ``[C, V]`` that every chunk's logits go through.

    New tensors for each chunk would be new pages for each chunk, whose zeroing costs the CPU more than the softmax.
    Where there is Triton, one kernel makes the gradient of the logits in their place, and needs no copy in float32: it
    moves 4 bytes a logit where the steps move 44. At a hidden size of 4,096 these are, by arithmetic, three quarters of
    the time of the head's products.
    """

    def __init__(self, hidden_NH: Tensor, master_VH: Tensor, labels_N: Tensor) -> None:
        self.hidden_NH, self.weight_VH = hidden_NH, master_VH.to(hidden_NH.dtype)
        self.target_N1 = labels_N[:, None].clamp_min(0)  # ignored positions are masked later
        self.fused = _runs_triton(hidden_NH)
        positions, vocabulary = len(hidden_NH), len(master_VH)
        size = chunk_positions(hidden_NH.device.type, vocabulary)
        self.rows = [slice(start, min(start + size, positions)) for start in range(0, positions, size)]
        self.product_CV = hidden_NH.new_empty(min(size, positions), vocabulary)
        one_buffer = self.fused or hidden_NH.dtype == torch.float32
        self.logits_CV = self.product_CV if one_buffer else torch.empty_like(self.product_CV, dtype=torch.float32)

    def evaluate(self, rows: slice, wants_gradient: bool, grad_C: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return float32 negative log-likelihoods ``[C]``, and their gradient for the logits ``[C, V]``.

        Args:
            rows: A chunk.
            wants_gradient: The gradient is wanted: softmax minus one-hot, times ``grad_C``, in the compute dtype.
            grad_C: ``[C]``, the gradient of the result; ``None`` for 1.
        """
        product_CV, logits_CV = self._buffers(rows)
        torch.mm(self.hidden_NH[rows], self.weight_VH.t(), out=product_CV)
        if self.fused:
            from .kernels.cross_entropy import cross_entropy

            return cross_entropy(product_CV, self.target_N1[rows, 0], grad_C, wants_gradient)
        logits_CV.copy_(product_CV)
        logits_CV.sub_(logits_CV.amax(1, keepdim=True))
        target_C1 = logits_CV.gather(1, self.target_N1[rows])
        sum_C1 = logits_CV.exp_().sum(1, keepdim=True)
        nll_C = (sum_C1.log() - target_C1).squeeze(1)
        if not wants_gradient:
            return nll_C, None
        probabilities_CV = logits_CV.div_(sum_C1)
        probabilities_CV.scatter_add_(1, self.target_N1[rows], torch.full_like(sum_C1, -1.0))
        if grad_C is not None:
            probabilities_CV.mul_(grad_C[:, None])
        return nll_C, product_CV.copy_(probabilities_CV)

    def _buffers(self, rows: slice) -> tuple[Tensor, Tensor]:
        count = rows.stop - rows.start
        return self.product_CV[:count], self.logits_CV[:count]


class Embedding(nn.Embedding):
    """Token embedding whose result is in ``output_dtype``, whatever the dtype of its weight."""

    output_dtype: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``[...]`` int64 to ``[..., H]`` in ``output_dtype``."""
        return super().forward(input).to(self.output_dtype)


class Head(nn.Linear):
    """The output head; computes in the dtype of its input, whatever the dtype of its weight."""

    def forward(self, input: Tensor, labels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Return logits, or each position's loss, or its divergence from other states.

        Args:
            input: ``[B, S, H]``.
            labels: ``[B, S]`` int64 aligned with the input ids, −100 ignored; ``None`` for logits.
            reference: In place of labels, for ``[N, H]``: other states ``[N, H]``, which get no gradient; the head must
                be frozen.

        Returns:
            Without labels, logits ``[B, S, V]``. With a reference, float32 ``[N]``: KL(p ‖ q) in nats, p of its states
            and q of the input's. With labels, float32 ``[B, S]``: nats of ``labels[:, t]`` given the
            row up to t − 1, and 0 where there is no label or no row before it.
        """
        if reference is not None:
            return _TokenKL.apply(input, reference, self.weight)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped
        if labels is None:
            return F.linear(input, self.weight.to(input.dtype))
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        nll = _TokenNLL.apply(input.reshape(-1, input.shape[-1]), self.weight, targets.flatten())  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        nll = nll.view_as(targets) * (targets != IGNORED)
        return F.pad(nll[:, :-1], (1, 0))
