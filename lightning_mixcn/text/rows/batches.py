"""Rows of documents' segments, laid out as the arrays of a batch."""

# B = rows of a batch, R = rows of a table, S = sequence length, n = tokens of a segment or segments of a table

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED_LABEL = -100
_SEGMENT_DTYPES = (np.int64, np.int32, np.int16, np.bool_, np.int8)


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Consecutive tokens of one document inside one row.

    Args:
        tokens: Token ids ``[n]``, int32.
        source: Index of the document's source.
        document: Number of the document: in training counted through all epochs of its source, in evaluation its index
            in the evaluation set.
        offset: Tokens of the document before this segment; not 0 in a continuation.
        learned: Mask of the tokens that may be labels ``[n]``, bool; None means all.
        parts: Tokens and side of each answer, where the segment holds answers that are isolated from each other (see
            `Preferences`); their tokens are all of the segment's.
    """

    tokens: NDArray[np.int32]
    source: int
    document: int
    offset: int
    learned: NDArray[np.bool_] | None = field(default=None, kw_only=True)
    parts: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)

    def part(self, start: int, stop: int) -> RowSegment:
        """Cut out tokens ``[start, stop)``."""
        learned = None if self.learned is None else self.learned[start:stop]
        return replace(self, tokens=self.tokens[start:stop], offset=self.offset + start, learned=learned)


@dataclass(frozen=True, slots=True)
class ScoredSegment(RowSegment):
    """Segment of a row for evaluation.

    Args:
        label_bytes: UTF-8 bytes credited to each token ``[n]``, int32.
        is_text: Mask of the tokens that are text, neither BOS nor EOS ``[n]``, bool.
    """

    label_bytes: NDArray[np.int32]
    is_text: NDArray[np.bool_]

    def part(self, start: int, stop: int) -> ScoredSegment:
        """Cut out tokens ``[start, stop)``."""
        cut = slice(start, stop)
        return replace(
            self,
            tokens=self.tokens[cut],
            offset=self.offset + start,
            learned=None if self.learned is None else self.learned[cut],
            label_bytes=self.label_bytes[cut],
            is_text=self.is_text[cut],
        )


Row = tuple[RowSegment, ...]
ScoredRow = tuple[ScoredSegment, ...]


class RowTable(NamedTuple):
    """Rows filled to their ends, as a few arrays: sending these to another process costs less than sending segments.

    Args:
        places: Row of the batch that each row is ``[R]``, int64.
        tokens: Tokens of the rows, padding included ``[R * S]``, int32.
        lengths: Tokens of each segment ``[n]``, int64; padding is a segment, too.
        numbers: Number of each segment in its row ``[n]``, int32, and -1 for padding.
        sources: Source of each segment ``[n]``, int16, and -1 for padding.
        continued: Mask of the segments whose document began in an earlier row ``[n]``, bool.
        sides: Side of each segment that is an answer, see `JudgedAnswer`, else 0 ``[n]``, int8.
        learned: Mask of the tokens that may be labels ``[R * S]``, bool; False on padding.
    """

    places: NDArray[np.int64]
    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    numbers: NDArray[np.int32]
    sources: NDArray[np.int16]
    continued: NDArray[np.bool_]
    sides: NDArray[np.int8]
    learned: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, Row]], sequence_length: int, padding_id: int) -> RowTable:
        """Make the table of rows.

        Args:
            rows: Rows of at most `sequence_length` tokens, each with its place in the batch.
            sequence_length: S.
            padding_id: Token id under the padding.
        """
        tokens, learned = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.bool_)]
        segments: list[tuple[int, int, int, bool, int]] = []  # length, number, source, continued, side
        for _, row in rows:
            tokens += [part.tokens for part in row]
            learned += [np.ones(len(part.tokens), np.bool_) if part.learned is None else part.learned for part in row]
            pieces = [(piece, part) for part in row for piece in part.parts or ((len(part.tokens), 0),)]
            segments += [
                (length, number, part.source, part.offset > 0, side)
                for number, ((length, side), part) in enumerate(pieces)
            ]
            if space := sequence_length - sum(len(part.tokens) for part in row):
                tokens.append(np.full(space, padding_id, dtype=np.int32))
                learned.append(np.zeros(space, dtype=np.bool_))
                segments.append((space, -1, -1, False, 0))
        columns = zip(*segments, strict=True) if segments else ((), (), (), (), ())
        arrays: list[NDArray[Any]] = [
            np.array(values, dtype) for values, dtype in zip(columns, _SEGMENT_DTYPES, strict=True)
        ]
        lengths, numbers, sources, continued, sides = arrays
        places = np.array([place for place, _ in rows], dtype=np.int64)
        return cls(places, np.concatenate(tokens), lengths, numbers, sources, continued, sides, np.concatenate(learned))


def collate_rows(
    rows: Sequence[Row], sequence_length: int, padding_id: int, *, isolated: bool = True, has_sides: bool = False
) -> dict[str, NDArray[Any]]:
    """Lay rows out as the arrays of a batch.

    The label of the first token of a segment is ignored, since nothing in the row predicts it, and so are those of
    tokens that are not learned from. Padding has label -100 and -1 in `document_ids` and `source_ids`; its positions
    begin at 0 again, so that it attends to no document.

    Args:
        rows: B rows of at most `sequence_length` tokens; an empty row is all padding.
        sequence_length: S.
        padding_id: Token id under the padding.
        isolated: True to begin positions at 0 with each segment, which isolates it; else they run through the row, and
            only the row's first label is ignored.
        has_sides: Documents are answers: give their ``sides``.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` int64, ``document_ids`` int32, ``source_ids`` int16 and
        ``continuation_mask`` bool (the token's document began in an earlier row), ``[B, S]``; for answers ``sides``
        int8, too, 0 on padding.
    """
    table = RowTable.of(list(enumerate(rows)), sequence_length, padding_id)
    return collate_tables([table], sequence_length, isolated=isolated, has_sides=has_sides)


def collate_tables(
    tables: Sequence[RowTable], sequence_length: int, *, isolated: bool = True, has_sides: bool = False
) -> dict[str, NDArray[Any]]:
    """Lay out the rows of a batch as `collate_rows` does, from tables that have some of them each."""
    table = tables[0] if len(tables) == 1 else RowTable(*map(np.concatenate, zip(*tables, strict=True)))
    places, tokens, lengths, numbers, sources, continued, sides, learned = table
    begins = np.cumsum(lengths) - lengths
    positions_restart = isolated | (numbers < 0) | (begins % sequence_length == 0)
    origins = np.maximum.accumulate(np.where(positions_restart, begins, 0))  # where position 0 of a segment is
    input_ids = tokens.astype(np.int64)
    labels = np.where(learned, input_ids, IGNORED_LABEL)
    labels[origins] = IGNORED_LABEL

    def in_order(values: NDArray[Any]) -> NDArray[Any]:
        made = values.reshape(-1, sequence_length)
        array = np.empty_like(made)
        array[places] = made
        return array

    arrays = {
        "input_ids": input_ids,
        "labels": labels,
        "document_ids": np.repeat(numbers, lengths),
        "position_ids": np.arange(len(tokens)) - np.repeat(origins, lengths),
        "source_ids": np.repeat(sources, lengths),
        "continuation_mask": np.repeat(continued, lengths),
        **({"sides": np.repeat(sides, lengths)} if has_sides else {}),
    }
    return {name: in_order(values) for name, values in arrays.items()}


def collate_evaluation_rows(
    rows: Sequence[ScoredRow], sequence_length: int, padding_id: int, *, has_sides: bool = False
) -> dict[str, NDArray[Any]]:
    """Lay rows for evaluation out as the arrays of a batch.

    Args:
        rows: B rows of at most `sequence_length` tokens; an empty row is all padding.
        sequence_length: S.
        padding_id: Token id under the padding.
        has_sides: Documents are answers: give their ``sides``.

    Returns:
        The arrays of `collate_rows`, and ``label_bytes`` int32 (bytes of text credited to each label; a document's
        sum to its UTF-8 bytes, less those of a first token that is text), ``text_mask`` bool (the label is text: not
        EOS, not ignored) and ``document_index`` int64 (in the evaluation set, -1 on padding), all ``[B, S]``.
    """
    batch = collate_rows(rows, sequence_length, padding_id, has_sides=has_sides)
    shape = (len(rows), sequence_length)
    batch["label_bytes"] = np.zeros(shape, dtype=np.int32)
    batch["text_mask"] = np.zeros(shape, dtype=np.bool_)
    batch["document_index"] = np.full(shape, -1, dtype=np.int64)
    for index, row in enumerate(rows):
        stop = 0
        for segment in row:
            start, stop = stop, stop + len(segment.tokens)
            batch["label_bytes"][index, start + 1 : stop] = segment.label_bytes[1:]
            batch["text_mask"][index, start + 1 : stop] = segment.is_text[1:]
            batch["document_index"][index, start:stop] = segment.document
    return batch
