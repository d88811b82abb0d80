"""Likelihood by context length: can a model that was adapted on short rows still read long ones?

The figure of Chinese-Mixtral's paper (Cui and Yao 2024, https://arxiv.org/abs/2403.01851): perplexity of documents that
are cut to each length.

Legend: S sources, L lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from lightning_mixcn.errors import NonFiniteError
from lightning_mixcn.model.reference import evaluating
from lightning_mixcn.studies.processes import over_ranks
from lightning_mixcn.text import DocumentSet, TextTokenizer

from .rows import (
    as_far_as_memory_goes,
    score_rows,
)


@dataclass(frozen=True)
class DocumentRow:
    """BOS, if the tokenizer puts it before a text, and the beginning of a document.

    Args:
        source: Number of the source, from 0.
        ids: int64 ``[N]``; the first is not predicted.
        byte_counts: int64 ``[N]``, UTF-8 bytes of text of each token; 0 for BOS.
    """

    source: int
    ids: Tensor
    byte_counts: Tensor


def longest_documents(
    sets: Sequence[DocumentSet],
    tokenizer: TextTokenizer,
    *,
    documents: int,
    max_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[DocumentRow]:
    """Tokenize this rank's share of the longest documents of each source.

    Args:
        sets: The documents of each source.
        tokenizer: The model's.
        documents: Number of documents of each source, those with most bytes first.
        max_tokens: Tokens of a row, BOS included; a longer document is cut.
        rank: Documents of all sources, longest first, are dealt to the ranks in turn.
        num_ranks: Number of ranks.

    Returns:
        Rows in descending order of the documents' bytes; the end of a document is not marked, so a document that is cut
        and one that is not are scored alike.
    """
    found: list[tuple[int, int, int]] = []
    for source, part in enumerate(sets):
        sizes = ((part.corpus.num_bytes_of(index), source, place) for place, index in enumerate(part.indices))
        found += nlargest(documents, sizes, key=lambda entry: entry[0])
    found.sort(key=lambda entry: -entry[0])
    rows = [
        _row(sets[source].text(place), source, tokenizer, max_tokens) for _, source, place in found[rank::num_ranks]
    ]
    return [row for row in rows if len(row.ids) > 1]  # an empty text has nothing to predict


def _row(text: str, source: int, tokenizer: TextTokenizer, max_tokens: int) -> DocumentRow:
    ((ids, byte_counts),) = tokenizer.encode_batch_with_bytes([text])
    begin = tokenizer.begin_ids
    row = torch.tensor([*begin, *ids.tolist()][:max_tokens])
    return DocumentRow(source, row, torch.tensor([*([0] * len(begin)), *byte_counts.tolist()][:max_tokens]))


class LengthLikelihood(TypedDict):
    """One source at one context length, over all ranks.

    ``nll_nats_per_token``, ``perplexity`` and ``bits_per_byte`` are of every document cut to ``length`` tokens: the sum
    over all of them divided once, by all their ``tokens`` (the predicted ones, not a document's first) or ``bytes``. A
    document that is shorter counts with what it has; ``documents_in_full`` of ``documents`` have ``length`` tokens.
    ``bucket_nll_nats_per_token`` is of the positions from the next shorter length on alone. Where no document reaches
    that far it is ``None``, and the other figures only repeat those of the shorter length.
    """

    source: str
    length: int
    nll_nats_per_token: float
    perplexity: float
    bits_per_byte: float | None
    bucket_nll_nats_per_token: float | None
    bucket_tokens: int
    tokens: int
    bytes: int
    documents: int
    documents_in_full: int


class LongContextResult(NamedTuple):
    """What `evaluate_lengths` gives, the same on every rank.

    Args:
        likelihoods: Likelihoods of each source that has documents, by ascending length.
        out_of_memory: Lengths that did not fit.
    """

    likelihoods: list[LengthLikelihood]
    out_of_memory: list[int]


def evaluate_lengths(
    model: nn.Module, rows: Sequence[DocumentRow], sources: Sequence[str], lengths: Sequence[int], chunk: int
) -> LongContextResult:
    """Score documents once at their full length, which gives every shorter length as a prefix.

    All ranks call it, each with documents of its own, or none. Randomness and the modules' modes stay as they are.

    Args:
        model: A model of `load_moe` or the PeftModel around it.
        rows: This rank's documents.
        sources: Names of all sources.
        lengths: Context lengths in tokens, BOS included, ascending.
        chunk: Tokens of a forward pass.

    Raises:
        FloatingPointError: on all ranks, if a likelihood is not finite.
    """
    with evaluating(model):
        sums, skipped = as_far_as_memory_goes(lengths, lambda left: _sum(model, rows, len(sources), left, chunk))
    fitting = [length for length in lengths if length not in skipped]
    return LongContextResult(_divide(sums, sources, fitting) if sums else [], skipped)


class _Sums(NamedTuple):
    """Sums over documents: by the bucket ``[S, L]`` of positions below each length and not below a shorter one."""

    nats: Tensor  # float64
    counts: Tensor  # int64 ``[3, S, L]``: tokens, bytes, and documents with that many tokens
    documents: Tensor  # int64 ``[S]``


def _sum(model: nn.Module, rows: Sequence[DocumentRow], num_sources: int, lengths: Sequence[int], chunk: int) -> _Sums:
    shape = (num_sources, len(lengths))
    nats, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros((3, *shape), dtype=torch.int64)
    documents = torch.zeros(num_sources, dtype=torch.int64)
    cut = [row.ids[: lengths[-1]] for row in rows]
    for row, ids, scores in zip(rows, cut, score_rows(model, cut, chunk), strict=True):
        documents[row.source] += 1
        start = 1
        for index, length in enumerate(lengths):
            stop = min(length, len(ids))
            if start < stop:
                nats[row.source, index] += scores.nats[start - 1 : stop - 1].sum()
                counts[0, row.source, index] += stop - start
                counts[1, row.source, index] += row.byte_counts[start:stop].sum()
            counts[2, row.source, index] += len(ids) >= length
            start = max(start, stop)
    device = next(model.parameters()).device  # where collectives work
    return _Sums(*(over_ranks(part.to(device)).cpu() for part in (nats, counts, documents)))


def _divide(sums: _Sums, sources: Sequence[str], lengths: Sequence[int]) -> list[LengthLikelihood]:
    results: list[LengthLikelihood] = []
    for source, name in enumerate(sources):
        if not int(sums.documents[source]):
            continue
        nats, tokens, text_bytes = 0.0, 0, 0
        for index, length in enumerate(lengths):
            bucket_nats, bucket_tokens = float(sums.nats[source, index]), int(sums.counts[0, source, index])
            nats += bucket_nats
            tokens += bucket_tokens
            text_bytes += int(sums.counts[1, source, index])
            if not math.isfinite(nats):
                raise NonFiniteError(
                    f"The likelihood of the source {name!r} at {length} tokens is {nats} nats in all: the model's "
                    "output is not finite. Check the checkpoint or the adapter that was loaded"
                )
            mean = nats / tokens
            results.append(
                {
                    "source": name,
                    "length": length,
                    "nll_nats_per_token": mean,
                    "perplexity": math.exp(mean) if mean < 700 else math.inf,
                    "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
                    "bucket_nll_nats_per_token": bucket_nats / bucket_tokens if bucket_tokens else None,
                    "bucket_tokens": bucket_tokens,
                    "tokens": tokens,
                    "bytes": text_bytes,
                    "documents": int(sums.documents[source]),
                    "documents_in_full": int(sums.counts[2, source, index]),
                }
            )
    return results
