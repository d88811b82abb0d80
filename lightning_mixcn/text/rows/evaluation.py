"""Documents of several sources as rows for evaluation: each token but a document's first is predicted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from lightning_mixcn.text.corpus.store import NAMED_PLACES

from .batches import ScoredRow, ScoredSegment

if TYPE_CHECKING:
    from lightning_mixcn.text.corpus.documents import DocumentSet
    from lightning_mixcn.text.corpus.store import DocumentOrigin

    from .encoders import DocumentEncoder


class EvaluationSet:
    """Documents of several sources as rows, tokenized once and held in memory.

    Args:
        documents: Documents of each source.
        encoder: Encoder of the documents.
        sequence_length: Tokens of a row.
        max_rows: Rows kept of each source; None keeps all. The last document of a capped source may be cut.
    """

    def __init__(
        self, documents: Sequence[DocumentSet], encoder: DocumentEncoder, sequence_length: int, max_rows: int | None
    ) -> None:
        """Tokenize the documents."""
        self.sequence_length = sequence_length
        self.padding_id, self.has_sides = encoder.padding_id, encoder.has_sides
        self._documents = documents
        self._firsts = [0, *accumulate(len(part) for part in documents)]
        self.rows: list[ScoredRow] = []
        for source, part in enumerate(documents):
            rows = evaluation_rows(part, encoder, sequence_length, source=source, first_document=self._firsts[source])
            self.rows += islice(rows, max_rows)

    def __len__(self) -> int:
        """Count the documents, before any cap."""
        return self._firsts[-1]

    def origin(self, index: int) -> DocumentOrigin:
        """Return the origin of the document that batches call `index`.

        Raises:
            IndexError: There is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index={index}`: the evaluation set has documents 0 to {len(self) - 1}")
        source = next(source for source, first in enumerate(self._firsts[1:]) if index < first)
        return self._documents[source].origin(index - self._firsts[source])


def evaluation_rows(
    documents: DocumentSet, encoder: DocumentEncoder, sequence_length: int, *, source: int = 0, first_document: int = 0
) -> Iterator[ScoredRow]:
    """Pack every document of a set once.

    A document that does not fit is cut, and its next row begins with the last token before the cut, so that every token
    but the first, BOS where there is one, is predicted once. A document that must stay whole begins a row of its own if
    it does not fit into the rest of one.

    Args:
        documents: Documents, packed in their order.
        encoder: Encoder of the documents.
        sequence_length: Tokens of a row, at least 2.
        source: Index of the source, for `source_ids`.
        first_document: Index of the first document in the evaluation set.

    Yields:
        Rows of at most `sequence_length` tokens.
    """
    row, space = list[ScoredSegment](), sequence_length
    for document in _scored_documents(documents, encoder, source, first_document):
        # A single token would have nothing to predict.
        if space < 2 or (encoder.keeps_whole and len(document.tokens) > space):
            yield tuple(row)
            row, space = [], sequence_length
        start, length = 0, len(document.tokens)
        while True:
            stop = min(start + space, length)
            row.append(document.part(start, stop))
            space -= stop - start
            if stop == length:
                break
            yield tuple(row)
            row, space, start = [], sequence_length, stop - 1
    if row:
        yield tuple(row)


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
                masks: Any = {"learned": document.learned, "parts": document.parts}
                yield ScoredSegment(document.tokens, source, first_document + index, 0, *labels, **masks)
