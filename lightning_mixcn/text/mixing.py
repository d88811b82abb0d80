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
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_mixcn.text.document_set import TrainingDocuments
    from lightning_mixcn.text.encoders import DocumentEncoder

# With fewer streams a round goes over several rows of each: of one row alone, every source would want a part.
_LEAST_CELLS = 8
_GOLDEN_SECTION = (math.sqrt(5) - 1) / 2
# What tokens a byte are first estimated from: documents spread evenly over the source, and when that is enough.
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


def tokens_per_byte(documents: TrainingDocuments, encoder: DocumentEncoder) -> float:
    """Estimate how many tokens a byte of a source's text has.

    Args:
        documents: Training documents of the source.
        encoder: What makes tokens of them.

    Returns:
        Tokens of some documents, spread evenly over the source, divided by the bytes of their text.
    """
    size = len(documents.corpus)
    num_tokens = num_bytes = 0
    for place in range(min(size, _SAMPLED_DOCUMENTS)):
        index = place * size // min(size, _SAMPLED_DOCUMENTS)
        tokens = len(encoder.encode(documents.corpus.text(index)).tokens) if index in documents else 0
        if tokens:
            num_tokens += tokens
            num_bytes += documents.corpus.num_bytes_of(index)
        if num_bytes >= _SAMPLED_BYTES:
            break
    # Every sampled document was held out or dropped: a token a byte is what streams begin to correct.
    return num_tokens / num_bytes if num_bytes else 1.0
