"""Evaluation batches: the rows of all sources, the same for any number of ranks, as many batches on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_mixcn.data.batch_tensors import batch_tensors
from lightning_mixcn.text import (
    DocumentEncoder,
    DocumentOrigin,
    DocumentSet,
    ScoredRow,
    collate_evaluation_rows,
    evaluation_rows,
)


class EvaluationSet:
    """Documents of several sources as rows, tokenized once and held in memory.

    Args:
        documents: The documents of each source.
        encoder: What makes tokens of them.
        sequence_length: Tokens of a row.
        max_rows: Rows kept of each source; None keeps all. The last document of a capped source may be cut.
    """

    def __init__(
        self, documents: Sequence[DocumentSet], encoder: DocumentEncoder, sequence_length: int, max_rows: int | None
    ) -> None:
        """Tokenize the documents."""
        self.sequence_length = sequence_length
        self.padding_id = encoder.padding_id
        self._documents = documents
        self._firsts = [0, *itertools.accumulate(len(part) for part in documents)]
        self.rows: list[ScoredRow] = []
        for source, part in enumerate(documents):
            rows = evaluation_rows(part, encoder, sequence_length, source=source, first_document=self._firsts[source])
            self.rows += itertools.islice(rows, max_rows)

    def __len__(self) -> int:
        """Count the documents, before any cap."""
        return self._firsts[-1]

    def origin(self, index: int) -> DocumentOrigin:
        """Tell where the document that batches call `index` was read.

        Raises:
            IndexError: There is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index={index}`: the evaluation set has documents 0 to {len(self) - 1}")
        source = next(source for source, first in enumerate(self._firsts[1:]) if index < first)
        return self._documents[source].origin(index - self._firsts[source])


class EvaluationLoader:
    """The batches of one rank.

    Batch i of all ranks together is the next ``num_ranks * micro_batch_size`` rows, rank-major; empty rows, all
    padding, fill the last one.

    Args:
        evaluation_set: The rows.
        micro_batch_size: Rows of a batch on one rank.
        num_ranks: Number of ranks that read different rows.
        rank: This rank among them.
    """

    def __init__(self, evaluation_set: EvaluationSet, micro_batch_size: int, num_ranks: int, rank: int) -> None:
        """Keep the arguments."""
        self._set = evaluation_set
        self._micro_batch_size = micro_batch_size
        self._num_ranks = num_ranks
        self._rank = rank

    def __len__(self) -> int:
        """Count the batches, the same on every rank."""
        return -(-len(self._set.rows) // (self._micro_batch_size * self._num_ranks))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give the rank's batches."""
        for batch in range(len(self)):
            start = (batch * self._num_ranks + self._rank) * self._micro_batch_size
            rows = self._set.rows[start : start + self._micro_batch_size]
            rows += [()] * (self._micro_batch_size - len(rows))
            yield batch_tensors(collate_evaluation_rows(rows, self._set.sequence_length, self._set.padding_id))
