"""Endless, deterministic streams of training rows, which can begin anywhere.

Row k of a run is row ``k // num_streams`` of stream ``k % num_streams``; it depends on the sources, the seed, the
number of streams, the sequence length and the packing, and not on ranks, loader workers or batch sizes. Each epoch of a
source is a seeded permutation of its documents, dealt to the streams like cards. Within a stream, the source that is
furthest behind its weight, counted in tokens or in bytes of text, gives the next segment; it may change at the end of a
document, or where a row's end cuts a document (which goes on when its source's turn comes again).

A stream's state is a few numbers: the document and the token each source stands at. No text is in it, and going on from
it reads no document but those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lightning_mixcn.text.packing import Row, Segment, fill_row
from lightning_mixcn.text.permutation import Permutation
from lightning_mixcn.text.stores import NAMED_PLACES

if TYPE_CHECKING:
    from lightning_mixcn.text.document_set import TrainingDocuments
    from lightning_mixcn.text.encoders import DocumentEncoder, EncodedDocument

# Pieces that `best_fit` chooses from, in each stream: with 64, less than 1 % of a row of 20 documents stays free.
_POOL_PIECES = 64

# Dropped one after the other, so many mean that a source has none that fits: else a stream would seek for ever.
_HOPELESS_DOCUMENTS = 1000

# What sources' weights are shares of.
WeightUnit = Literal["tokens", "bytes"]

# Plain values, see `RowStream.state`.
StreamState = dict[str, Any]


@dataclass(frozen=True)
class StreamPlan:
    """All that decides the order of rows.

    Args:
        documents: Training documents of each source, at least one document each.
        encoder: What makes tokens of them.
        sequence_length: Tokens of a row.
        num_streams: Number of streams.
        seed: Seed of the permutations.
        packing: One of `PACKINGS`.
        weight_unit: What the sources' weights are shares of; bytes of text are the same for every tokenizer.
    """

    documents: Sequence[TrainingDocuments]
    encoder: DocumentEncoder
    sequence_length: int
    num_streams: int
    seed: int
    packing: str = "documents"
    weight_unit: WeightUnit = "tokens"

    def open(self, indices: Sequence[int], states: Mapping[int, StreamState] | None = None) -> dict[int, RowStream]:
        """Open streams.

        Args:
            indices: Numbers of the streams.
            states: Where streams stand, by their number; others stand at their beginning.

        Returns:
            The streams by their number.
        """
        return {index: RowStream(self, index, (states or {}).get(index)) for index in indices}


class RowStream:
    """One stream of rows.

    Args:
        plan: What decides the order of rows.
        index: Number of the stream.
        state: Where it stands; None is before its first row.
    """

    def __init__(self, plan: StreamPlan, index: int, state: StreamState | None = None) -> None:
        """Stand there; no text is read yet."""
        self._plan = plan
        self._readers = [_Reader(plan, index, source) for source in range(len(plan.documents))]
        weights = np.asarray([documents.corpus.source.weight for documents in plan.documents], dtype=np.float64)
        self._weights: list[float] = (weights / weights.sum()).tolist()
        # The streams' first rows are of all sources in proportion, and not all of the same one.
        first = int(np.searchsorted(np.cumsum(self._weights), (index + 0.5) / plan.num_streams))
        head_starts = [plan.sequence_length * weight for weight in self._weights]
        self._served = [0.0 if source == first else start for source, start in enumerate(head_starts)]
        self._pool: list[_Piece] = []
        self.position = 0
        if state is not None:
            self.position, self._served = state["position"], list(state["served"])
            self._pool = [
                _Piece(source, document, offset, length, None) for source, document, offset, length in state["pool"]
            ]
            for reader, (number, offset), too_long in zip(
                self._readers, state["documents"], state["too_long"], strict=True
            ):
                reader.number, reader.offset, reader.too_long = number, offset, list(too_long)

    def state(self) -> StreamState:
        """Where the stream stands, in plain values.

        Returns:
            ``position`` (rows made), ``documents`` (number and token offset each source stands at), ``served`` (tokens,
            or bytes, that each source gave, with its head start), ``pool`` (source, number, offset and length of pieces
            that wait for a row in `best_fit`), and ``too_long`` (documents of each source that were dropped,
            shortened, and refused by the encoder).
        """
        return {
            "position": self.position,
            "documents": [[reader.number, reader.offset] for reader in self._readers],
            "served": list(self._served),
            "pool": [list(piece[:4]) for piece in self._pool],
            "too_long": [list(reader.too_long) for reader in self._readers],
        }

    @property
    def exhausted(self) -> bool:
        """Whether every source has been read `max_epochs` times."""
        return not self._pool and all(reader.exhausted for reader in self._readers)

    def next_row(self) -> Row:
        """Make the next row and move behind it.

        Returns:
            The row: full (nearly, in `best_fit`), or short where the sources end, and empty after that.
        """
        self.position += 1
        if self._plan.packing == "best_fit":
            return self._best_fitting_row()
        return fill_row(self._next_segment, self._plan.sequence_length)

    def _next_segment(self, space: int) -> Segment | None:
        while live := [source for source, reader in enumerate(self._readers) if not reader.exhausted]:
            source = min(live, key=lambda candidate: (self._served[candidate] / self._weights[candidate], candidate))
            if self._plan.encoder.keeps_whole and self._readers[source].remaining > space:
                return None
            segment = self._readers[source].take(space)
            if len(segment.tokens):  # else the document was dropped
                self._served[source] += self._readers[source].taken
                return segment
        return None

    def _best_fitting_row(self) -> Row:
        """The piece that waits longest, and then always the longest one that fits."""
        row: list[Segment] = []
        space = self._plan.sequence_length
        while self._fill_pool():
            fitting = [place for place, piece in enumerate(self._pool) if piece.length <= space]
            if not fitting:
                break
            place = max(fitting, key=lambda candidate: (self._pool[candidate].length, -candidate)) if row else 0
            piece = self._pool.pop(place)
            row.append(piece.segment or self._readers[piece.source].segment(*piece[1:4]))
            space -= piece.length
        return tuple(row)

    def _fill_pool(self) -> bool:
        while len(self._pool) < _POOL_PIECES:
            segment = self._next_segment(self._plan.sequence_length)
            if segment is None:
                break
            piece = _Piece(segment.source, segment.document, segment.offset, len(segment.tokens), segment)
            self._pool.append(piece)
        return bool(self._pool)


class _Piece(NamedTuple):
    """A segment that waits for a row; `segment` is None after a resume, until it is needed."""

    source: int
    document: int
    offset: int
    length: int
    segment: Segment | None


class _Reader:
    """Where a stream is in a source: the document dealt to it last, counted through all epochs, and a token of it."""

    def __init__(self, plan: StreamPlan, stream: int, source: int) -> None:
        self._plan = plan
        self._documents = plan.documents[source]
        self._source = source
        self.number = stream
        self.offset = 0
        self.taken = 0.0  # tokens, or bytes, of the last segment
        self.too_long = [0, 0, 0]  # documents dropped, shortened and refused
        self._dropped_since_last = 0
        self._index: int | None = None  # of document `number` in the corpus, once it is known to be for training
        self._document: EncodedDocument | None = None
        epochs = self._documents.corpus.source.max_epochs
        self._end = None if epochs is None else epochs * len(self._documents.corpus)

    @property
    def exhausted(self) -> bool:
        """Moves to the next document that is for training, if there is one."""
        while self._index is None and (self._end is None or self.number < self._end):
            index = self._index_of(self.number)
            if index in self._documents:
                self._index = index
            else:
                self.number += self._plan.num_streams
        return self._index is None

    @property
    def remaining(self) -> int:
        """Tokens of the document that were not taken yet."""
        return len(self._current.tokens) - self.offset

    def take(self, space: int) -> Segment:
        """The next tokens of the document, at most `space`; call only where not `exhausted`."""
        document = self._current
        if self.offset == 0:
            self._count_too_long(document)
        segment = self._cut(document, self.number, self.offset, space)
        self.taken = self._size(len(segment.tokens), len(document.tokens))
        self.offset += len(segment.tokens)
        if self.offset == len(document.tokens):
            self.number, self.offset = self.number + self._plan.num_streams, 0
            self._index = self._document = None
        return segment

    def segment(self, number: int, offset: int, length: int) -> Segment:
        """A segment that was taken before."""
        return self._cut(self._encode(self._index_of(number)), number, offset, length)

    @property
    def _current(self) -> EncodedDocument:
        assert self._index is not None, "exhausted"
        if self._document is None:
            self._document = self._encode(self._index)
        return self._document

    def _size(self, tokens: int, of_document: int) -> float:
        """How much some tokens of the document count; in bytes, a part of it has its share of the document's."""
        if self._plan.weight_unit == "tokens" or not tokens:
            return tokens
        assert self._index is not None, "exhausted"
        return self._documents.corpus.num_bytes_of(self._index) * tokens / of_document

    def _cut(self, document: EncodedDocument, number: int, offset: int, space: int) -> Segment:
        part = slice(offset, offset + space)
        learnt = None if document.learnt is None else document.learnt[part]
        return Segment(document.tokens[part], self._source, number, offset, learnt=learnt)

    def _count_too_long(self, document: EncodedDocument) -> None:
        self.too_long[0] += document.too_long == "dropped"
        self.too_long[1] += document.too_long == "shortened"
        if document.refused is not None:
            assert self._index is not None, "exhausted"
            if self._documents.corpus.on_bad_record == "error" or self.too_long[2] < NAMED_PLACES:
                self._documents.corpus.refuse(self._index, document.refused)
            self.too_long[2] += 1
        self._dropped_since_last = 0 if len(document.tokens) else self._dropped_since_last + 1
        if self._dropped_since_last == _HOPELESS_DOCUMENTS:
            raise ValueError(
                f"{_HOPELESS_DOCUMENTS} documents of source {self._documents.name!r}, one after the other, were longer "
                "than a row and dropped, or refused by the template. Raise `sequence_length`, choose another "
                "`on_too_long`, or another `template`"
            )

    def _encode(self, index: int) -> EncodedDocument:
        return self._plan.encoder.encode(self._documents.corpus.text(index))

    def _index_of(self, number: int) -> int:
        size = len(self._documents.corpus)
        epoch, place = divmod(number, size)
        return _permutation(size, f"{self._plan.seed}/{self._documents.name}/{epoch}")[place]


@lru_cache(maxsize=64)
def _permutation(size: int, key: str) -> Permutation:
    return Permutation(size, key)
