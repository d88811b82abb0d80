"""Endless, deterministic streams of training rows.

Row k of a run is row ``k // num_streams`` of stream ``k % num_streams``; it depends on the sources, the seed, the
number of streams and the sequence length, and not on ranks, loader workers or batch sizes. Each epoch of a source is a
seeded permutation of its documents, dealt to the streams like cards. Within a stream, the source that is furthest
behind its weight, counted in tokens, gives the next segment; it may change at the end of a document, or where a row's
end cuts a document (which goes on when its source's turn comes again).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_mixcn.text.packing import Row, Segment, encode_document, fill_row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_mixcn.text.corpus import DocumentSet
    from lightning_mixcn.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class StreamPlan:
    """All that decides the order of rows.

    Args:
        documents: Training documents of each source, at least one document each.
        tokenizer: The tokenizer.
        sequence_length: Tokens of a row.
        num_streams: Number of streams.
        seed: Seed of the permutations.
    """

    documents: Sequence[DocumentSet]
    tokenizer: TextTokenizer
    sequence_length: int
    num_streams: int
    seed: int

    def open(self, indices: Sequence[int]) -> dict[int, RowStream]:
        """Open streams at their beginning; they share the permutations.

        Args:
            indices: Numbers of the streams.

        Returns:
            The streams by their number.
        """
        orders = [ShuffledDocuments(documents, self.seed) for documents in self.documents]
        return {index: RowStream(self, index, orders) for index in indices}


class ShuffledDocuments:
    """The documents of a source, epoch after epoch, each epoch in another order.

    Args:
        documents: The documents.
        seed: Seed of the run; the order depends on it, the source's name and the epoch.
    """

    def __init__(self, documents: DocumentSet, seed: int) -> None:
        """Begin with no permutation computed."""
        self._documents = documents
        self._seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}
        epochs = documents.corpus.source.max_epochs
        self.num_documents = None if epochs is None else epochs * len(documents)

    def text(self, number: int) -> str:
        """Get the text of document `number`, counted through all epochs.

        Args:
            number: Less than `num_documents`, unless that is None.

        Returns:
            The text.
        """
        epoch, place = divmod(number, len(self._documents))
        if epoch not in self._permutations:
            while len(self._permutations) >= 4:  # streams are at most an epoch or so apart
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = self._permutation(epoch)
        return self._documents.text(int(self._permutations[epoch][place]))

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # numpy promises the raw bits of a bit generator for ever, but not what `permutation` makes of them (NEP 19).
        key = hashlib.blake2b(f"{self._seed}/{self._documents.name}/{epoch}".encode(), digest_size=16).digest()
        bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(self._documents))
        return np.argsort(bits, kind="stable").astype(np.int64)


class RowStream:
    """One stream of rows.

    Args:
        plan: What decides the order of rows.
        index: Number of the stream.
        orders: The shuffled documents of each source.
    """

    def __init__(self, plan: StreamPlan, index: int, orders: Sequence[ShuffledDocuments]) -> None:
        """Stand before the first row."""
        self._plan = plan
        self._cursors = [_Cursor(plan, index, source, order) for source, order in enumerate(orders)]
        weights = np.asarray([documents.corpus.source.weight for documents in plan.documents], dtype=np.float64)
        self._weights: list[float] = (weights / weights.sum()).tolist()
        # The streams' first rows are of all sources in proportion, and not all of the same one.
        first = int(np.searchsorted(np.cumsum(self._weights), (index + 0.5) / plan.num_streams))
        head_starts = [plan.sequence_length * weight for weight in self._weights]
        self._served = [0.0 if source == first else start for source, start in enumerate(head_starts)]
        self.position = 0

    @property
    def exhausted(self) -> bool:
        """Whether every source has been read `max_epochs` times."""
        return all(cursor.exhausted for cursor in self._cursors)

    def next_row(self) -> Row:
        """Make the next row and move behind it.

        Returns:
            The row: full, or short where the sources end, and empty after that.
        """
        self.position += 1
        return fill_row(self._next_segment, self._plan.sequence_length)

    def _next_segment(self, space: int) -> Segment | None:
        live = [source for source, cursor in enumerate(self._cursors) if not cursor.exhausted]
        if not live:
            return None
        source = min(live, key=lambda candidate: (self._served[candidate] / self._weights[candidate], candidate))
        segment = self._cursors[source].take(space)
        self._served[source] += len(segment.tokens)
        return segment


class _Cursor:
    """Where a stream is in a source: the documents it was dealt so far, and the tokens left of the last one."""

    def __init__(self, plan: StreamPlan, stream: int, source: int, order: ShuffledDocuments) -> None:
        self._tokenizer = plan.tokenizer
        self._num_streams = plan.num_streams
        self._source = source
        self._order = order
        self._next_document = stream
        self._left = np.zeros(0, dtype=np.int32)

    @property
    def exhausted(self) -> bool:
        end = self._order.num_documents
        return not len(self._left) and end is not None and self._next_document >= end

    def take(self, space: int) -> Segment:
        if not len(self._left):
            self._left = encode_document(self._tokenizer, self._order.text(self._next_document))
            self._next_document += self._num_streams
        taken, self._left = self._left[:space], self._left[space:]
        return Segment(taken, self._source)
