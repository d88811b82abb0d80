"""Likelihood of each document, summed from the rows that hold its pieces.

Legend: B rows, S positions of a row, P pieces (one document in one batch).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .likelihood import per_position, scored_positions


class DocumentScores(NamedTuple):
    """Sums over the pieces of documents in a batch, all ``[P]`` and on the CPU; pieces of one document add up.

    Args:
        source: int64, which source.
        document: int64, which document of the evaluation set.
        nats: float64, over all labels, the end of the document included.
        text_nats: float64, over text alone.
        tokens: int64, number of labels.
        bytes: int64, UTF-8 bytes of text.
    """

    source: Tensor
    document: Tensor
    nats: Tensor
    text_nats: Tensor
    tokens: Tensor
    bytes: Tensor


def score_documents(nll: Tensor, batch: dict[str, Tensor]) -> DocumentScores:
    """Sum a batch by document.

    Args:
        nll: ``[B, S]`` float, nats of each label, 0 where there is none.
        batch: An evaluation batch: ``labels``, ``source_ids``, ``document_index``, ``label_bytes``, ``text_mask``.

    Returns:
        One entry for each document that has a label in this batch, in ascending order of (source, document).
    """
    scored_BS = scored_positions(batch["labels"])
    # Sums are made on the CPU, whose index_add_ is deterministic.
    source_T = per_position(batch["source_ids"], batch["labels"])[scored_BS].cpu().long()
    document_T = batch["document_index"][scored_BS].cpu().long()
    keys_P2, piece_T = torch.unique(torch.stack((source_T, document_T), 1), dim=0, return_inverse=True)
    nll_T, text_T = nll.detach()[scored_BS].cpu().double(), batch["text_mask"][scored_BS].cpu()
    bytes_T = batch["label_bytes"][scored_BS].cpu().long() * text_T

    def total(values_T: Tensor) -> Tensor:
        return torch.zeros(len(keys_P2), dtype=values_T.dtype).index_add_(0, piece_T, values_T)

    return DocumentScores(
        source=keys_P2[:, 0],
        document=keys_P2[:, 1],
        nats=total(nll_T),
        text_nats=total(nll_T * text_T),
        tokens=total(torch.ones_like(piece_T)),
        bytes=total(bytes_T),
    )
