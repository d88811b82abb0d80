"""Embedding and output head: float32 masters where they are trained, and a loss that never holds all logits.

Legend: N positions, H hidden, V vocabulary, C positions of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
# Logits of a chunk. On the CPU, 28 MiB of float32: from 32 MiB on glibc maps fresh pages at each allocation, which cost
# a fifth of the loss. On a GPU, 256 MiB: larger products run faster.
_CHUNK_LOGITS = {"cpu": 7 * 2**20, "cuda": 2**26}


class _TokenNLL(torch.autograd.Function):
    """Negative log-likelihood of each position, chunk by chunk.

    A position's loss depends on its own hidden state only. With a frozen head its gradient for a unit upstream gradient
    is therefore computed in forward, ``[N, H]``, and backward only scales its rows. With a trained head, backward
    computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, master_VH: Tensor, labels_N: Tensor) -> Tensor:
        weight_VH = master_VH.to(hidden_NH.dtype)
        nll_N = torch.zeros(len(labels_N), dtype=torch.float32, device=hidden_NH.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        unit_NH = torch.empty_like(hidden_NH) if needs_hidden and not needs_weight else None
        for rows in _chunks(hidden_NH, len(weight_VH)):
            logits_CV, target_C1 = (hidden_NH[rows] @ weight_VH.t()).float(), labels_N[rows, None].clamp_min(0)
            log_sum_C1 = logits_CV.logsumexp(1, keepdim=True)
            nll_N[rows] = (log_sum_C1 - logits_CV.gather(1, target_C1)).squeeze(1)
            if unit_NH is not None:
                unit_NH[rows] = _dlogits(logits_CV, log_sum_C1, target_C1).to(weight_VH.dtype) @ weight_VH
        if unit_NH is None:
            ctx.save_for_backward(hidden_NH, master_VH, labels_N)
        else:
            ctx.save_for_backward(unit_NH)
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if len(ctx.saved_tensors) == 1:
            (unit_NH,) = ctx.saved_tensors
            return (unit_NH * grad_N[:, None]).to(unit_NH.dtype), None, None
        hidden_NH, master_VH, labels_N = ctx.saved_tensors
        weight_VH = master_VH.to(hidden_NH.dtype)
        dhidden_NH = torch.empty_like(hidden_NH)
        dweight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for rows in _chunks(hidden_NH, len(weight_VH)):
            logits_CV, target_C1 = (hidden_NH[rows] @ weight_VH.t()).float(), labels_N[rows, None].clamp_min(0)
            dlogits_CV = _dlogits(logits_CV, logits_CV.logsumexp(1, keepdim=True), target_C1)
            dlogits_CV = dlogits_CV.mul_(grad_N[rows, None]).to(weight_VH.dtype)
            dhidden_NH[rows] = dlogits_CV @ weight_VH
            dweight_VH += dlogits_CV.t() @ hidden_NH[rows]
        return dhidden_NH, dweight_VH.to(master_VH.dtype), None


def _chunks(hidden_NH: Tensor, vocabulary: int) -> list[slice]:
    positions, size = len(hidden_NH), max(64, _CHUNK_LOGITS.get(hidden_NH.device.type, 2**24) // vocabulary)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _dlogits(logits_CV: Tensor, log_sum_C1: Tensor, target_C1: Tensor) -> Tensor:
    """Softmax minus one-hot, in place of the logits."""
    probabilities = logits_CV.sub_(log_sum_C1).exp_()
    return probabilities.scatter_add_(1, target_C1, torch.full_like(log_sum_C1, -1.0))


class Embedding(nn.Embedding):
    """Token embedding whose result is in ``output_dtype``, whatever the dtype of its weight."""

    output_dtype: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        """``[...]`` int64 to ``[..., H]`` in ``output_dtype``."""
        return super().forward(input).to(self.output_dtype)


class Head(nn.Linear):
    """The output head; computes in the dtype of its input, whatever the dtype of its weight."""

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or each position's loss.

        Args:
            input: ``[B, S, H]``.
            labels: ``[B, S]`` int64 aligned with the input ids, −100 ignored; ``None`` for logits.

        Returns:
            Without labels, logits ``[B, S, V]``. With labels, float32 ``[B, S]``: nats of ``labels[:, t]`` given the
            row up to t − 1, and 0 where there is no label or no row before it.
        """
        if labels is None:
            return F.linear(input, self.weight.to(input.dtype))
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        nll = _TokenNLL.apply(input.reshape(-1, input.shape[-1]), self.weight, targets.flatten())  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        nll = nll.view_as(targets) * (targets != IGNORED)
        return F.pad(nll[:, :-1], (1, 0))
