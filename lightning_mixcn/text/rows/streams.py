"""Endless, deterministic streams of training rows, which can begin anywhere.

Row k of a run is row ``k // num_streams`` of stream ``k % num_streams``; it depends on the sources, the seed, the
number of streams, the sequence length and the packing (where weights go by progress, also on the rows of the run), and
not on ranks, loader workers or batch sizes. Each epoch of a source is a seeded permutation of its documents, dealt to
the streams like cards. Which source a row is of follows from the row's number (`row_shares`); what padding or whole
documents leave over is made up for in the stream's next rows. Each stream has one open document a source: a document
that does not fit is cut and goes on in the source's next row.

A stream's state is a few numbers: the document and the token at which each source continues, and what each was owed.
No text is in it, and resuming reads no document but those.

Three packings, none of which loses a token; EOS comes at a document's true end only:

* ``documents``: rows are filled to the last token; a document that does not fit is cut at the end of the row and goes
  on in a later one. Documents do not see each other.
* ``best_fit``: only documents longer than a row are cut; the pieces are put where they fit best, and what stays free is
  padded (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830).
* ``concatenate``: rows as in ``documents``, but documents see the text before them in the row, as in most
  pre-training before isolation became cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    get_args,
)

import numpy as np

from lightning_mixcn.errors import UserError
from lightning_mixcn.text.corpus.sources import weight_at
from lightning_mixcn.text.corpus.store import NAMED_PLACES

from .batches import Row, RowSegment
from .encoders import SourceSample, sample_source

if TYPE_CHECKING:
    from lightning_mixcn.text.corpus.documents import TrainingDocuments

    from .encoders import DocumentEncoder, EncodedDocument

Packing = Literal["documents", "best_fit", "concatenate"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)

# With fewer streams a round of `row_shares` goes over several rows of each: of one row alone, every source would want a
# part.
_LEAST_CELLS = 8
_GOLDEN_SECTION = (math.sqrt(5) - 1) / 2

# Documents that `best_fit` chooses from, in each stream: with 64, less than 1 % of a row of 20 documents stays free.
# Each source has its share of them, and no fewer than the second number.
_POOL_DOCUMENTS, _LEAST_POOL_DOCUMENTS = 64, 16

# A document is not cut for the mixture's sake where less than this share of a row would be on either side of the cut.
_LEAST_PART = 1 / 16

# Rows, evenly spaced, that a mean of weights by progress is taken of.
_SAMPLED_ROWS = 256

# Dropped one after the other, so many mean that a source has none that fits: else a stream would seek for ever.
_HOPELESS_DOCUMENTS = 1000

# Unit of the sources' weights.
WeightUnit = Literal["tokens", "bytes"]

# Plain values, see `RowStream.state`.
StreamState = dict[str, Any]


@dataclass(frozen=True)
class StreamPlan:
    """Settings that decide the order of rows.

    Args:
        documents: Training documents of each source, at least one document each.
        encoder: Encoder of the documents.
        sequence_length: Tokens of a row.
        num_streams: Number of streams.
        seed: Seed of the permutations.
        packing: Layout of documents in rows.
        weight_unit: Unit of the sources' weights; bytes of text are the same for every tokenizer.
        progress_rows: Rows of the run, of which weights by progress are fractions; None where there are none.
    """

    documents: Sequence[TrainingDocuments]
    encoder: DocumentEncoder
    sequence_length: int
    num_streams: int
    seed: int
    packing: str = "documents"
    weight_unit: WeightUnit = "tokens"
    progress_rows: int | None = None

    @cached_property
    def by_progress(self) -> bool:
        """True if a source's weight changes in the run."""
        return any(isinstance(documents.corpus.source.weight, Mapping) for documents in self.documents)

    def weights_at(self, row: int) -> list[float]:
        """Return the share of each source in `weight_unit` at a row of the run ``[sources]``; they sum to 1."""
        if not self.by_progress:
            return self._first_weights
        assert self.progress_rows is not None, "the data module knows them"
        return self._weights(row / self.progress_rows)

    def mean_weights(self, rows: range) -> list[float]:
        """Return the mean of `weights_at` over rows of the run ``[sources]``, of the first row where there are none."""
        if not self.by_progress or not rows:
            return self.weights_at(rows.start)
        sampled = rows[:: -(-len(rows) // _SAMPLED_ROWS)]
        means: list[float] = np.mean([self.weights_at(row) for row in sampled], axis=0).tolist()
        return means

    @cached_property
    def _first_weights(self) -> list[float]:
        return self._weights(0.0)

    def _weights(self, progress: float) -> list[float]:
        weights = np.asarray([weight_at(documents.corpus.source.weight, progress) for documents in self.documents])
        shares: list[float] = (weights / weights.sum()).tolist()
        return shares

    @cached_property
    def samples(self) -> list[SourceSample]:
        """First estimates of each source ``[sources]``, from a few documents."""
        any_order = self.packing == "best_fit"
        return [
            sample_source(documents, self.encoder, self.sequence_length, any_order=any_order)
            for documents in self.documents
        ]

    def open(self, indices: Sequence[int], states: Mapping[int, StreamState] | None = None) -> dict[int, RowStream]:
        """Open streams.

        Args:
            indices: Numbers of the streams.
            states: States of streams by their number; the others begin at their first row.

        Returns:
            The streams by their number.
        """
        return {index: RowStream(self, index, (states or {}).get(index)) for index in indices}


def row_shares(row: int, num_streams: int, shares: Sequence[float]) -> list[float]:
    """Divide a row among sources, so that every window of rows holds the sources' weights.

    The rows of a *round*, one of each stream, are the cells of a circle on which each source owns an arc as long as its
    share. A row belongs to the source whose arc covers its cell; a cell with an arc's end in it is divided, which
    happens to at most one row a source and round. So a round is exact, whole rows stay with one source, and long
    documents are seldom cut. Consecutive rows take cells a golden section apart, which keeps shorter windows even
    (https://en.wikipedia.org/wiki/Low-discrepancy_sequence#Additive_recurrence), and each round goes one step back: a
    window of a round's length that begins anywhere then misses one cell at most, and every stream comes by every arc.

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


class RowStream:
    """One stream of rows.

    Args:
        plan: Settings that decide the order of rows.
        index: Number of the stream.
        state: State to continue from; None is before the first row.
    """

    def __init__(self, plan: StreamPlan, index: int, state: StreamState | None = None) -> None:
        """Take the position; no text is read yet."""
        self._plan = plan
        self._index = index
        self._readers = [_Reader(plan, index, source) for source in range(len(plan.documents))]
        self._served = [0] * len(plan.documents)
        self._phases = [0.0] * len(plan.documents)
        self._owed: dict[int, float] = {}  # tokens of each source by the end of the row
        self._first: int | None = None  # source that is owed most at the beginning of the row
        self._pools: list[list[_Waiting]] = [[] for _ in plan.documents]
        self.position = 0
        if state is not None:
            self._restore(state)

    def state(self) -> StreamState:
        """Give the stream's state in plain values.

        Returns:
            ``position`` (rows made), ``documents`` (number of the open document and token offset in it, of each
            source), ``read`` (tokens and bytes read of each source), ``served`` (tokens of each source in rows),
            ``phases`` (tokens by which the rows planned so far are ahead of each source's share), ``pools`` (of each
            source number, offset, length and divisibility of the documents that wait for a row in `best_fit`), and
            ``too_long`` (documents of each source that were dropped, shortened, and refused by the encoder).
        """
        return {
            "position": self.position,
            "documents": [[reader.number, reader.offset] for reader in self._readers],
            "read": [list(reader.read) for reader in self._readers],
            "served": list(self._served),
            "phases": list(self._phases),
            "pools": [[list(piece[:4]) for piece in pool] for pool in self._pools],
            "too_long": [list(reader.too_long) for reader in self._readers],
        }

    def _restore(self, state: StreamState) -> None:
        self.position, self._served, self._phases = state["position"], list(state["served"]), list(state["phases"])
        self._pools = [
            [_Waiting(number, offset, length, divisible, None) for number, offset, length, divisible in pool]
            for pool in state["pools"]
        ]
        for reader, (number, offset), read, too_long in zip(
            self._readers, state["documents"], state["read"], state["too_long"], strict=True
        ):
            reader.number, reader.offset, reader.read, reader.too_long = number, offset, list(read), list(too_long)

    @property
    def exhausted(self) -> bool:
        """True once every source has been read `max_epochs` times."""
        return not self._live()

    def next_row(self) -> Row:
        """Make the next row.

        Returns:
            The row: full (nearly, in `best_fit`), or short where the sources end, and empty after that.
        """
        self._plan_row()
        take = self._next_piece if self._plan.packing == "best_fit" else self._next_segment
        row, space = list[RowSegment](), self._plan.sequence_length
        while space > 0 and (segment := take(space)) is not None:
            row.append(segment)
            tokens = len(segment.tokens)
            space -= tokens
            self._served[segment.source] += tokens
            self._owed[segment.source] = self._owed_to(segment.source) - tokens
        self.position += 1
        return tuple(row)

    def _live(self) -> list[int]:
        """List the sources that still have documents."""
        return [source for source, reader in enumerate(self._readers) if self._pools[source] or not reader.exhausted]

    def _plan_row(self) -> None:
        """Set what each source is owed by the end of this row, in tokens, of the sources that have not ended."""
        live, length = self._live(), self._plan.sequence_length
        number = self.position * self._plan.num_streams + self._index
        shares = self._shares_of(live, self._plan.weights_at(number))
        if self._plan.by_progress:
            self._follow_weights(live, shares, max(0, number - self._plan.num_streams))
        # Rows that are padded hold fewer tokens, so their sources get more of them.
        is_padded = self._plan.encoder.keeps_whole
        fills = [self._plan.samples[source].fill if is_padded else 1.0 for source in live]
        rows = [share / fill for share, fill in zip(shares, fills, strict=True)]
        parts = row_shares(number, self._plan.num_streams, [row / sum(rows) for row in rows]) if live else []
        planned = [part * fill * length for part, fill in zip(parts, fills, strict=True)]
        total = sum(self._served[source] for source in live) + sum(planned)
        self._owed = {}
        for source, share, tokens in zip(live, shares, planned, strict=True):
            self._phases[source] += tokens - share * sum(planned)
            self._owed[source] = share * total + self._phases[source] - self._served[source]
        self._first = max(live, key=self._owed_to, default=None)

    def _follow_weights(self, live: list[int], shares: list[float], row_before: int) -> None:
        """Move the phases so that what is owed is the sum of each row's share of that row, though shares change.

        ``share * total`` takes the present share of all that was served. By summation by parts it is more than the sum
        over the rows by each change of the share times the total before it, which the phases take back. The live
        sources' phases sum to zero: what an ended one leaves is divided by the shares that they had.
        """
        before = self._shares_of(live, self._plan.weights_at(row_before))
        total = sum(self._served[source] for source in live)
        left = sum(self._phases[source] for source in live)
        for source, share, earlier in zip(live, shares, before, strict=True):
            self._phases[source] += (earlier - share) * total - earlier * left

    def token_shares(self, weights: Sequence[float]) -> list[float]:
        """Turn weights of sources into shares of tokens ``[sources]``, as if no source ended; they sum to 1."""
        return self._shares_of(list(range(len(self._readers))), weights)

    def ended_sources(self) -> list[int]:
        """List the sources that have been read `max_epochs` times."""
        return sorted(set(range(len(self._readers))) - set(self._live()))

    def _shares_of(self, live: list[int], weights_of: Sequence[float]) -> list[float]:
        """Turn the weights of the live sources into shares of tokens, which sum to 1.

        Bytes are turned into tokens by what was read so far, and as if a row of the plan's estimate had been read
        before. A better estimate also corrects what was served before it.
        """
        weights = [weights_of[source] for source in live]
        if live and not any(weights):  # those that have a weight here have ended
            return [1 / len(live)] * len(live)
        if self._plan.weight_unit == "bytes":
            first = self._plan.sequence_length
            for place, source in enumerate(live):
                tokens, num_bytes = self._readers[source].read
                weights[place] *= (first + tokens) / (first / self._plan.samples[source].tokens_per_byte + num_bytes)
        return [weight / sum(weights) for weight in weights]

    def _owed_to(self, source: int) -> float:
        return self._owed.get(source, 0.0)

    def _limit(self, source: int, space: int) -> int:
        """Give the tokens at which a document of the source is cut."""
        owed, least = round(self._owed_to(source)), self._plan.sequence_length * _LEAST_PART
        return owed if owed >= least and space - owed >= least else space

    def _candidates(self) -> list[int]:
        """Order the sources that the rest of the row may be of: those that are owed some, then the row's first one."""
        live = sorted(self._live(), key=self._owed_to, reverse=True)
        owed = [source for source in live if self._owed_to(source) > 0]
        first = self._first if self._first in live else next(iter(live), None)
        return owed if first is None or first in owed else [*owed, first]

    def _next_segment(self, space: int) -> RowSegment | None:
        """Give the next tokens of the source that is owed most."""
        keeps_whole = self._plan.encoder.keeps_whole
        while candidates := self._candidates():
            reader = self._readers[candidates[0]]
            if keeps_whole and reader.remaining > space:
                return None
            segment = reader.take(space if keeps_whole else self._limit(candidates[0], space))
            if len(segment.tokens):  # else the document was dropped
                return segment
        return None

    def _next_piece(self, space: int) -> RowSegment | None:
        """Give a document of the source that is owed most and has one that fits: the longest, in a new row the oldest.

        A document that is longer than a row is cut where its source has none that fits.
        """
        while candidates := self._candidates():
            for source in candidates:
                pool, limit = self._fill_pool(source), self._limit(source, space)
                if not pool:
                    continue  # its last documents were dropped
                place = 0 if space == self._plan.sequence_length else _longest_fitting(pool, space)
                if place is None and limit >= self._plan.sequence_length * _LEAST_PART:
                    place = next((place for place, waiting in enumerate(pool) if waiting.divisible), None)
                if place is not None:
                    return self._take_waiting(source, place, limit)
            if self._candidates() == candidates:  # else a source has ended, and another takes its place
                break
        return None

    def _take_waiting(self, source: int, place: int, limit: int) -> RowSegment:
        """Take a document out of the pool; what a long one has beyond the limit stays there."""
        pool, reader = self._pools[source], self._readers[source]
        waiting = pool.pop(place)
        segment = waiting.segment or reader.segment(waiting.number, waiting.offset, waiting.length)
        if waiting.divisible and waiting.length > limit:
            rest = segment.part(limit, waiting.length)
            pool.insert(place, _Waiting(waiting.number, rest.offset, len(rest.tokens), True, rest))
            segment = segment.part(0, limit)
        return segment

    def _fill_pool(self, source: int) -> list[_Waiting]:
        pool, reader, length = self._pools[source], self._readers[source], self._plan.sequence_length
        size = max(_LEAST_POOL_DOCUMENTS, _POOL_DOCUMENTS // len(self._readers))
        while len(pool) < size and sum(waiting.length for waiting in pool) < size * length and not reader.exhausted:
            segment = reader.take(reader.remaining)
            if len(segment.tokens):  # else the document was dropped
                divisible = len(segment.tokens) > length
                pool.append(_Waiting(segment.document, 0, len(segment.tokens), divisible, segment))
        return pool


class _Waiting(NamedTuple):
    """The rest of a document that waits for a row; `segment` is None after a resume, until it is needed."""

    number: int
    offset: int
    length: int
    divisible: bool  # the document is longer than a row
    segment: RowSegment | None


def _longest_fitting(pool: Sequence[_Waiting], space: int) -> int | None:
    """Find the longest document of at most `space` tokens, among equals the oldest."""
    found, length = None, 0
    for place, waiting in enumerate(pool):
        if length < waiting.length <= space:
            found, length = place, waiting.length
    return found


class _Reader:
    """A stream's position in a source: the document dealt to it last, counted through all epochs, and a token of it."""

    def __init__(self, plan: StreamPlan, stream: int, source: int) -> None:
        self._plan = plan
        self._documents = plan.documents[source]
        self._source = source
        self.number = stream
        self.offset = 0
        self.read: list[float] = [0, 0.0]  # tokens and bytes of text
        self.too_long = [0, 0, 0]  # documents dropped, shortened and refused
        self._dropped_since_last = 0
        self._index: int | None = None  # of document `number` in the corpus, once it is known to be for training
        self._document: EncodedDocument | None = None
        epochs = self._documents.corpus.source.max_epochs
        self._end = None if epochs is None else epochs * len(self._documents.corpus)

    @property
    def exhausted(self) -> bool:
        """True if the source has ended; else the next document for training is current."""
        while self._index is None and (self._end is None or self.number < self._end):
            index = self._documents.index_of(self.number, self._plan.seed)
            if index in self._documents:
                self._index = index
            else:
                self.number += self._plan.num_streams
        return self._index is None

    @property
    def remaining(self) -> int:
        """Tokens of the document that were not taken yet."""
        return len(self._current.tokens) - self.offset

    def take(self, space: int) -> RowSegment:
        """Take the next tokens of the document, at most `space`; call only where not `exhausted`."""
        document = self._current
        if self.offset == 0:
            self._count_too_long(document)
        segment = self._cut(document, self.number, self.offset, space)
        self._count_read(len(segment.tokens), len(document.tokens))
        self.offset += len(segment.tokens)
        if self.offset == len(document.tokens):
            self.number, self.offset = self.number + self._plan.num_streams, 0
            self._index = self._document = None
        return segment

    def segment(self, number: int, offset: int, length: int) -> RowSegment:
        """Cut out a segment that was taken before. Raises: ValueError if a checkpoint's is not in the document."""
        document = self._encode(self._documents.index_of(number, self._plan.seed))
        if not 0 < length <= len(document.tokens) - offset:
            self._refuse_place(number, offset + length, len(document.tokens))
        return self._cut(document, number, offset, length)

    def _refuse_place(self, number: int, offset: int, tokens: int) -> NoReturn:
        raise UserError(
            f"The checkpoint's position in the data is token {offset:,} of document {number:,} of source "
            f"{self._documents.name!r}, which has {tokens:,} tokens. Restore the checkpoint from a copy, or go on from "
            "another one"
        )

    @property
    def _current(self) -> EncodedDocument:
        assert self._index is not None, "exhausted"
        if self._document is None:
            self._document = self._encode(self._index)
            if self.offset and self.offset >= len(self._document.tokens):  # else nothing would ever come of it
                self._refuse_place(self.number, self.offset, len(self._document.tokens))
        return self._document

    def _count_read(self, tokens: int, of_document: int) -> None:
        """Count tokens and, where weights are of bytes, the tokens' share of the document's bytes."""
        self.read[0] += tokens
        if self._plan.weight_unit == "bytes" and tokens:
            assert self._index is not None, "exhausted"
            self.read[1] += self._documents.corpus.num_bytes_of(self._index) * tokens / of_document

    def _cut(self, document: EncodedDocument, number: int, offset: int, space: int) -> RowSegment:
        part = slice(offset, offset + space)
        learned = None if document.learned is None else document.learned[part]
        # Answers stay whole, so a segment has all of its document's.
        return RowSegment(document.tokens[part], self._source, number, offset, learned=learned, parts=document.parts)

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
            raise UserError(
                f"{_HOPELESS_DOCUMENTS} documents of source {self._documents.name!r}, one after the other, were longer "
                "than a row and dropped, or refused by the template. Raise `sequence_length`, choose another "
                "`on_too_long`, or another `template`"
            )

    def _encode(self, index: int) -> EncodedDocument:
        return self._plan.encoder.encode(self._documents.corpus.text(index))
