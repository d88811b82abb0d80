"""Which source the tokens of each training row are of, so that every window of rows holds the sources' weights.

The rows of a *round*, one of each stream, are the cells of a circle on which each source owns an arc as long as its
share. A row belongs to the source whose arc its cell lies in; a cell with an arc's end in it is divided, which happens
to at most one row a source and round. So a round is exact, whole rows stay with one source, and long documents are
seldom cut. Consecutive rows take cells a golden section apart, which keeps shorter windows even
(https://en.wikipedia.org/wiki/Low-discrepancy_sequence#Additive_recurrence), and each round goes one step back: a
window of a round's length that begins anywhere then misses one cell at most, and every stream comes by every arc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_mixcn.text.corpus.corpus import TrainingDocuments

    from .encoders import DocumentEncoder

# With fewer streams a round goes over several rows of each: of one row alone, every source would want a part.
_LEAST_CELLS = 8
_GOLDEN_SECTION = (math.sqrt(5) - 1) / 2
# What a source is sampled by: documents spread evenly over the source, and when that is enough.
_SAMPLED_DOCUMENTS = 32
_SAMPLED_BYTES = 1 << 18


def row_shares(row: int, num_streams: int, shares: Sequence[float]) -> list[float]:
    """Divide a row among sources.

    Args:
        row: Number of the row in the run.
        num_streams: Number of streams; the sums are exact over each `num_streams` rows (over 8 to 14 if there are fewer
            streams).
        shares: Share of each source in the run ``[sources]``; they sum to 1.

    Returns:
        Share of each source in the row ``[sources]``; they sum to 1, and most rows have one that is 1.
    """
    cells = num_streams * math.ceil(_LEAST_CELLS / num_streams)
    round_number, place = divmod(row, cells)
    cell = _step(cells) * (place - round_number) % cells
    parts, begin = [], 0.0
    for share in shares:
        end = begin + share * cells
        parts.append(max(0.0, min(end, cell + 1) - max(begin, cell)))
        begin = end
    total = sum(parts)  # 1, but for rounding
    return [part / total for part in parts]


@lru_cache(maxsize=16)
def _step(cells: int) -> int:
    """Give the number nearest to a golden section of the circle that visits all its cells."""
    aim = cells * _GOLDEN_SECTION
    return min((step for step in range(1, cells) if math.gcd(step, cells) == 1), key=lambda step: abs(step - aim))


@dataclass(frozen=True)
class SourceSample:
    """First estimates of a source from some of its documents; streams correct them as they read.

    Args:
        tokens_per_byte: Tokens divided by bytes of text.
        fill: Share of a row that is no padding, where rows hold whole documents of this source alone; else 1.
    """

    tokens_per_byte: float
    fill: float


def sample_source(
    documents: TrainingDocuments, encoder: DocumentEncoder, sequence_length: int, *, any_order: bool = False
) -> SourceSample:
    """Encode some training documents, spread evenly over a source.

    Args:
        documents: Training documents of the source.
        encoder: Encoder of the documents.
        sequence_length: Tokens of a row.
        any_order: Rows take the documents that fit best, not the next ones.
    """
    size = len(documents.corpus)
    num_bytes, lengths = 0, list[int]()
    for place in range(min(size, _SAMPLED_DOCUMENTS)):
        index = place * size // min(size, _SAMPLED_DOCUMENTS)
        tokens = len(encoder.encode(documents.corpus.text(index)).tokens) if index in documents else 0
        if tokens:
            lengths.append(tokens)
            num_bytes += documents.corpus.num_bytes_of(index)
        if num_bytes >= _SAMPLED_BYTES:
            break
    if not lengths or not num_bytes:  # every sampled document was held out or dropped
        return SourceSample(1.0, 1.0)
    if any_order:  # first fit, the longest first
        lengths.sort(reverse=True)
    fill = _fill(lengths, sequence_length, any_order=any_order) if encoder.keeps_whole else 1.0
    return SourceSample(sum(lengths) / num_bytes, fill)


def _fill(lengths: Sequence[int], sequence_length: int, *, any_order: bool) -> float:
    """Put whole documents into rows, and give the share of the finished rows that is no padding."""
    filled = [0]
    for length in lengths:
        begun = range(len(filled)) if any_order else range(len(filled) - 1, len(filled))
        row = next((row for row in begun if filled[row] + length <= sequence_length), None)
        if row is None:
            filled.append(length)
        else:
            filled[row] += length
    finished = filled[:-1]
    return sum(finished) / (len(finished) * sequence_length) if finished else 1.0
