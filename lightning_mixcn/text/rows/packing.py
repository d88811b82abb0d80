"""Rows of `sequence_length` tokens, made of segments of documents.

Three packings, none of which loses a token:

* ``documents``: rows are filled to the last token; a document that does not fit is cut at the end of the row and goes
  on in a later one. Documents do not see each other.
* ``best_fit``: only documents longer than a row are cut; the pieces are put where they fit best, and what stays free is
  padded (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830).
* ``concatenate``: rows as in ``documents``, but documents see what stands before them in the row, as in most
  pre-training before isolation became cheap.

EOS stands at a document's true end only. In rows for evaluation a continuation begins with the last token of the
row before, so that every token but BOS is predicted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lightning_mixcn.text.corpus.store import NAMED_PLACES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_mixcn.text.corpus.corpus import DocumentSet

    from .encoders import DocumentEncoder

PACKINGS = ("documents", "best_fit", "concatenate")


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one document inside one row.

    Args:
        tokens: Token ids ``[n]``, int32.
        source: Index of the document's source.
        document: Number of the document: in training counted through all epochs of its source, in evaluation its index
            in the evaluation set.
        offset: Tokens of the document before this segment; not 0 in a continuation.
        learnt: Whether each token is learnt from ``[n]``, bool; None learns from all.
    """

    tokens: NDArray[np.int32]
    source: int
    document: int
    offset: int
    learnt: NDArray[np.bool_] | None = field(default=None, kw_only=True)

    def part(self, start: int, stop: int) -> Segment:
        """Cut out tokens ``[start, stop)``."""
        learnt = None if self.learnt is None else self.learnt[start:stop]
        return Segment(self.tokens[start:stop], self.source, self.document, self.offset + start, learnt=learnt)


@dataclass(frozen=True, slots=True)
class ScoredSegment(Segment):
    """A segment of a row for evaluation.

    Args:
        label_bytes: UTF-8 bytes credited to each token ``[n]``, int32.
        is_text: Whether each token ``[n]`` is text, not BOS or EOS; bool.
    """

    label_bytes: NDArray[np.int32]
    is_text: NDArray[np.bool_]

    def part(self, start: int, stop: int) -> ScoredSegment:
        """Cut out tokens ``[start, stop)``."""
        cut = slice(start, stop)
        labels = self.label_bytes[cut], self.is_text[cut]
        learnt = None if self.learnt is None else self.learnt[cut]
        return ScoredSegment(self.tokens[cut], self.source, self.document, self.offset + start, *labels, learnt=learnt)


AnySegment = TypeVar("AnySegment", bound=Segment)
Row = tuple[Segment, ...]
ScoredRow = tuple[ScoredSegment, ...]


def fill_row(next_segment: Callable[[int], AnySegment | None], sequence_length: int) -> tuple[AnySegment, ...]:
    """Put segments behind each other until the row is full or nothing is left.

    Args:
        next_segment: Gives the next segment of at most that many tokens, or None when nothing is left (or fits).
        sequence_length: Tokens of a row.

    Returns:
        The segments; they are shorter together than `sequence_length` only if `next_segment` gave None.
    """
    segments: list[AnySegment] = []
    space = sequence_length
    while space > 0 and (segment := next_segment(space)) is not None:
        segments.append(segment)
        space -= len(segment.tokens)
    return tuple(segments)


def evaluation_rows(
    documents: DocumentSet, encoder: DocumentEncoder, sequence_length: int, *, source: int = 0, first_document: int = 0
) -> Iterator[ScoredRow]:
    """Pack every document of a set once, with one token of overlap where a document goes on in the next row.

    A document that must stay whole begins a row of its own if it does not fit in the rest of one.

    Args:
        documents: The documents, packed in their order.
        encoder: What makes tokens of them.
        sequence_length: Tokens of a row, at least 2.
        source: Index of the source, for `source_ids`.
        first_document: Index of the first document in the evaluation set.

    Yields:
        Rows of at most `sequence_length` tokens.
    """
    pending = _scored_documents(documents, encoder, source, first_document)
    current = next(pending, None)
    position = 0

    def next_segment(space: int) -> ScoredSegment | None:
        nonlocal current, position
        if current is None or space < 2:  # one token alone would have nothing to predict
            return None
        if encoder.keeps_whole and len(current.tokens) > space:
            return None
        stop = min(position + space, len(current.tokens))
        segment = current.part(position, stop)
        if stop == len(current.tokens):
            current, position = next(pending, None), 0
        else:
            position = stop - 1
        return segment

    while current is not None:
        yield fill_row(next_segment, sequence_length)


def _scored_documents(
    documents: DocumentSet, encoder: DocumentEncoder, source: int, first_document: int, batch: int = 64
) -> Iterator[ScoredSegment]:
    refused = 0
    for start in range(0, len(documents), batch):
        indices = range(start, min(start + batch, len(documents)))
        scored = encoder.score([documents.text(index) for index in indices])
        for index, document in zip(indices, scored, strict=True):
            if document.refused is not None:
                refused += 1
                if documents.corpus.on_bad_record == "error" or refused <= NAMED_PLACES:
                    documents.corpus.refuse(documents.indices[index], document.refused)
            if len(document.tokens):
                labels = document.label_bytes, document.is_text
                yield ScoredSegment(document.tokens, source, first_document + index, 0, *labels, learnt=document.learnt)
