"""Instruction tuning."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mixcn.arguments import Name, check_arguments
from lightning_mixcn.metrics import scored_positions
from lightning_mixcn.model.causal_lm import CausalLMOutput

from .causal_lm import Batch, CausalLMModule


class InstructModule(CausalLMModule):
    """Instruction tuning: the model learns from answers, as `InstructDataModule` labels them.

    It begins from a base or an instruct model (`base`), from the adapter of a pre-training run, which goes on training
    (`adapter`), or from a model into which such an adapter was merged (`mixcn export`, then `base`).

    Args:
        base: Hugging Face folder, 4-bit folder of `mixcn quantize`, or hub id.
        loss_weighting: ``token`` weighs every token with a label alike, so that long answers count more;
            ``conversation`` weighs every conversation alike, by the mean of its tokens with labels.
        kwargs: Arguments of `CausalLMModule`.
    """

    def __init__(self, base: Name, loss_weighting: Literal["token", "conversation"] = "token", **kwargs: Any) -> None:
        """Check the arguments; the model is made in `configure_model`."""
        check_arguments(InstructModule, locals())
        super().__init__(base, **kwargs)
        self.loss_weighting = loss_weighting

    def compute_loss(self, batch: Batch, output: CausalLMOutput) -> tuple[Tensor, Tensor]:
        """Return the sum of the loss over labels and their number; or over conversations, of each one's mean."""
        if self.loss_weighting == "token":
            return super().compute_loss(batch, output)
        assert output.nll is not None
        return mean_by_document(output.nll, batch["labels"], batch["document_ids"])


def mean_by_document(nll_BS: Tensor, labels_BS: Tensor, document_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each document's mean over its labels.

    Args:
        nll_BS: Loss of each label in nats, float32 ``[B, S]``, 0 where there is none.
        labels_BS: int64 ``[B, S]``.
        document_ids_BS: int32 ``[B, S]``, numbers within a row, −1 on padding.

    Returns:
        The sum, a differentiable scalar, and the number of documents with a label, int64.
    """
    rows, length = labels_BS.shape
    row_B1 = torch.arange(rows, device=labels_BS.device)[:, None]
    # A row of S tokens has at most S documents; padding, which has no label, counts as the row's first.
    document_N = (row_B1 * length + document_ids_BS.clamp_min(0)).flatten()
    scored_N = scored_positions(labels_BS).flatten()
    labels_D = torch.zeros(rows * length, dtype=torch.int64, device=labels_BS.device)
    labels_D.index_add_(0, document_N, scored_N.long())
    weight_N = scored_N / labels_D.clamp_min(1)[document_N]
    return (nll_BS.flatten() * weight_N).sum(), (labels_D > 0).sum()
