"""The longest documents of some sources as rows of tokens, dealt to ranks.

Legend: N tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest

import torch
from torch import Tensor

from lightning_mixcn.text import DocumentSet, TextTokenizer


@dataclass(frozen=True)
class DocumentRow:
    """BOS and the beginning of a document.

    Args:
        source: Which source, from 0.
        ids: int64 ``[N]``; the first is BOS.
        byte_counts: int64 ``[N]``, UTF-8 bytes of text that each token stands for; 0 for BOS.
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
        documents: How many of each source, those with most bytes first.
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
    row = torch.tensor([tokenizer.bos_id, *ids[: max_tokens - 1].tolist()])
    return DocumentRow(source, row, torch.tensor([0, *byte_counts[: max_tokens - 1].tolist()]))
