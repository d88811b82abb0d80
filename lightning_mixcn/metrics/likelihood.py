"""Likelihood of each source: nats per token, and bits per byte to compare across vocabularies.

Legend: B rows, S positions of a row.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mixcn.errors import UserError

_IGNORED = -100


class Likelihood(TypedDict):
    """Figures of one source."""

    nll_nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


def scored_positions(labels_BS: Tensor) -> Tensor:
    """Tell where a token is predicted: it has a label, and a row before it.

    Args:
        labels_BS: ``[B, S]`` int64, aligned with the input ids, −100 ignored.

    Returns:
        ``[B, S]`` bool.
    """
    scored_BS = labels_BS != _IGNORED
    scored_BS[:, 0] = False
    return scored_BS


def per_position(source_ids: Tensor, like_BS: Tensor) -> Tensor:
    """Return the source of each position ``[B, S]``, from ``[B]`` (one a row) or ``[B, S]``."""
    return source_ids if source_ids.ndim == 2 else source_ids[:, None].expand_as(like_BS)


class SourceLikelihood(Metric):
    """Likelihood per source, summed in float64 and int64 over batches and ranks, then divided once.

    torchmetrics' own Perplexity counts in float32, which stops at 2²⁴ tokens.

    Args:
        num_sources: Number of sources; they are numbered from 0.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    nats: Tensor
    text_nats: Tensor
    tokens: Tensor
    text_bytes: Tensor

    def __init__(self, num_sources: int) -> None:
        """Make empty sums."""
        super().__init__()
        if num_sources < 1:
            raise UserError(f"`num_sources={num_sources}`: expected at least one source")
        self.num_sources = num_sources
        for name in ("nats", "text_nats"):
            self.add_state(name, torch.zeros(num_sources, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tokens", "text_bytes"):
            self.add_state(name, torch.zeros(num_sources, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, labels: Tensor, source_ids: Tensor, label_bytes: Tensor, text_mask: Tensor) -> None:
        """Add one batch.

        Args:
            nll: ``[B, S]`` float, nats of each label, 0 where there is none.
            labels: ``[B, S]`` int64, −100 ignored.
            source_ids: ``[B]`` or ``[B, S]`` integers, −1 in padding.
            label_bytes: ``[B, S]`` integers, UTF-8 bytes of text each label stands for.
            text_mask: ``[B, S]`` bool, true where the label is text and not, e.g., the end of a document.

        Raises:
            ValueError: a labelled token belongs to none of the sources.
        """
        scored_BS = scored_positions(labels)
        source_BS = per_position(source_ids, labels)
        known_BS = (source_BS >= 0) & (source_BS < self.num_sources)
        if bool((scored_BS & ~known_BS).any()):
            strange = sorted(set(source_BS[scored_BS & ~known_BS].tolist()))
            raise UserError(
                f"`source_ids` holds {strange} at labelled tokens; expected 0 to {self.num_sources - 1}. "
                "Give tokens without a source the label -100"
            )
        # A loop over few sources, since CUDA's scatter_add of floats is not deterministic.
        for source in range(self.num_sources):
            of_source_BS = scored_BS & (source_BS == source)
            text_BS = of_source_BS & text_mask
            self.nats[source] += torch.where(of_source_BS, nll.detach(), 0.0).sum(dtype=torch.float64)
            self.text_nats[source] += torch.where(text_BS, nll.detach(), 0.0).sum(dtype=torch.float64)
            self.tokens[source] += of_source_BS.sum()
            self.text_bytes[source] += torch.where(text_BS, label_bytes, 0).sum(dtype=torch.int64)

    def compute(self) -> dict[int, Likelihood]:
        """Return the results of every source that had tokens, by its number.

        Returns:
            ``nll_nats_per_token`` over all labels, ends of documents included; ``bits_per_byte`` over text alone (NaN
            where no label stands for a byte); ``tokens`` labels; ``bytes`` of text.
        """
        results: dict[int, Likelihood] = {}
        sums = (self.nats, self.text_nats, self.tokens, self.text_bytes)
        columns = zip(*(state.tolist() for state in sums), strict=True)
        for source, (nats, text_nats, tokens, text_bytes) in enumerate(columns):
            if tokens:
                results[source] = {
                    "nll_nats_per_token": nats / tokens,
                    "bits_per_byte": text_nats / math.log(2) / text_bytes if text_bytes else math.nan,
                    "tokens": tokens,
                    "bytes": text_bytes,
                }
        return results


def overall_bits_per_byte(results: Iterable[Likelihood]) -> float | None:
    """Return the bits per byte of several sources together: the sum of their bits over the sum of their bytes.

    A source counts by its bytes of text in the evaluation data, whatever its weight in training.

    Args:
        results: Results of each source, over all ranks.

    Returns:
        ``None`` where no source has bytes of text.

    >>> zh: Likelihood = {"nll_nats_per_token": 2.0, "bits_per_byte": 2.0, "tokens": 9, "bytes": 300}
    >>> overall_bits_per_byte([zh, zh | {"bits_per_byte": 1.0, "bytes": 100}])
    1.75
    """
    counted = [result for result in results if result["bytes"]]
    bits = math.fsum(result["bits_per_byte"] * result["bytes"] for result in counted)
    return bits / sum(result["bytes"] for result in counted) if counted else None


class DocumentScores(NamedTuple):
    """Sums over the pieces of documents in a batch, all ``[P]`` and on the CPU; pieces of one document add up.

    Args:
        source: int64, number of the source.
        document: int64, number of the document in the evaluation set.
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
