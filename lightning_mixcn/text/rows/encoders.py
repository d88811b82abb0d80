"""Documents to tokens, and which of them are labels: the seam between streams and kinds of text."""

# n = tokens of a document

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from lightning_mixcn.text.chat.records import load_conversation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_mixcn.text.chat.turns import ChatTemplate, Turn, TurnTokens
    from lightning_mixcn.text.corpus.documents import TrainingDocuments
    from lightning_mixcn.tokenizer.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document as tokens.

    Args:
        tokens: Token ids ``[n]``, int32; none if the document was dropped.
        learned: Mask of the tokens that are labels ``[n]``, bool; None means all.
        too_long: Treatment of a document that was longer than a row; None if it was not.
        refused: Reason why the document cannot be encoded; it has no tokens then.
        parts: Tokens and side of each answer that it consists of, see `RowSegment`.
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_] | None = None
    too_long: Literal["dropped", "shortened"] | None = None
    refused: str | None = None
    parts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """A document as tokens, with the bytes that its likelihood is divided by.

    Args:
        tokens: Token ids ``[n]``, int32; none if the document was dropped.
        label_bytes: UTF-8 bytes credited to each token ``[n]``, int32.
        is_text: Mask of the tokens that are text, and no control tokens ``[n]``, bool.
        learned: Mask of the tokens that are scored ``[n]``, bool; None means all.
        refused: Reason why the document cannot be encoded; it has no tokens then.
        parts: Tokens and side of each answer that it consists of, see `RowSegment`.
    """

    tokens: NDArray[np.int32]
    label_bytes: NDArray[np.int32]
    is_text: NDArray[np.bool_]
    learned: NDArray[np.bool_] | None = None
    refused: str | None = None
    parts: tuple[tuple[int, int], ...] = ()


class DocumentEncoder(Protocol):
    """Encoder of the documents of a run."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Names and values of all that the tokens depend on; a run is resumed only if they are the same."""

    @property
    def padding_id(self) -> int:
        """Token id under the padding."""

    @property
    def keeps_whole(self) -> bool:
        """True if rows must not cut a document; no document is longer than a row then."""

    @property
    def has_sides(self) -> bool:
        """True if documents are answers that were compared or judged, see `Preferences`."""

    def encode(self, text: str) -> EncodedDocument:
        """Encode a document of a corpus."""

    def score(self, texts: Sequence[str]) -> list[ScoredDocument]:
        """Encode documents for evaluation."""


@dataclass(frozen=True)
class PlainText:
    """Encoder of plain text as ``BOS text EOS``, or ``text EOS`` where the tokenizer itself puts no BOS before a text.

    All of it are labels, but for the first token, which nothing predicts.

    Args:
        tokenizer: Tokenizer of the model.
    """

    tokenizer: TextTokenizer
    keeps_whole = False
    has_sides = False

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digest of the tokenizer."""
        return {"tokenizer": self.tokenizer.fingerprint}

    @property
    def padding_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_id

    def encode(self, text: str) -> EncodedDocument:
        """Encode a text as ``[n]``."""
        (ids,) = self.tokenizer.encode_batch([text])
        return EncodedDocument(np.array([*self.tokenizer.begin_ids, *ids, self.tokenizer.eos_id], dtype=np.int32))

    def score(self, texts: Sequence[str]) -> list[ScoredDocument]:
        """Encode texts; a text's bytes are credited to its tokens, and none to EOS."""
        begin, end = self.tokenizer.begin_ids, (self.tokenizer.eos_id,)
        around = (len(begin), len(end))
        scored = []
        for ids, widths in self.tokenizer.encode_batch_with_bytes(texts):
            tokens = np.concatenate([begin, ids, end]).astype(np.int32)
            is_text = np.pad(np.ones(len(ids), dtype=np.bool_), around)
            scored.append(ScoredDocument(tokens, np.pad(widths, around), is_text))
        return scored


TooLongPolicy = Literal["cut_at_turn", "truncate", "drop"]
Answers = Literal["all", "last"]


@dataclass(frozen=True)
class Conversations:
    """Encoder of conversations by a chat template; answers, and the token that ends each, are labels.

    Answers whose turn is not `learned` are there to be answered to, and have no labels.

    Args:
        template: Chat template of the conversations.
        tokenizer: Tokenizer of the model.
        sequence_length: Tokens of a row, which no conversation exceeds.
        on_too_long: Treatment of a longer one: `cut_at_turn` keeps the exchanges from the beginning that fit whole,
            `truncate` keeps as many tokens as fit, so that the last answer has no end and none is learned, `drop` drops
            it. Whatever leaves no answer is dropped.
        answers: Answers that are learned: `all` of a conversation, or the `last` one, of those whose turn is `learned`.
    """

    template: ChatTemplate
    tokenizer: TextTokenizer
    sequence_length: int
    on_too_long: TooLongPolicy = "cut_at_turn"
    answers: Answers = "all"
    keeps_whole = True
    has_sides = False

    @property
    def fingerprint(self) -> dict[str, str]:
        """Tokenizer and template, as digests, and the choices."""
        template = hashlib.blake2b(repr(self.template).encode(), digest_size=16).hexdigest()
        choices = {"on_too_long": self.on_too_long, "answers": self.answers}
        return {"tokenizer": self.tokenizer.fingerprint, "template": template, **choices}

    @property
    def padding_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_id

    def encode(self, text: str) -> EncodedDocument:
        """Encode a conversation of a corpus as ``[n]``; one that the template refuses has no tokens."""
        try:
            laid_out = self._lay_out(load_conversation(text))
        except ValueError as error:
            return EncodedDocument(np.zeros(0, np.int32), np.zeros(0, np.bool_), refused=str(error))
        return EncodedDocument(laid_out.tokens, laid_out.learned, laid_out.too_long)

    def score(self, texts: Sequence[str]) -> list[ScoredDocument]:
        """Encode conversations; the bytes of an answer that is scored are credited to its first token."""
        return [self._score(load_conversation(text)) for text in texts]

    def refusal(self, text: str) -> str | None:
        """Say why the template refuses a conversation, None if it does not; quick, since nothing is tokenized."""
        try:
            self.template.check_conversation(load_conversation(text), self.tokenizer)
        except ValueError as error:
            return str(error)
        return None

    def _score(self, turns: list[Turn]) -> ScoredDocument:
        try:
            laid_out = self._lay_out(turns)
        except ValueError as error:
            none = np.zeros(0, np.bool_)
            return ScoredDocument(np.zeros(0, np.int32), np.zeros(0, np.int32), none, none, refused=str(error))
        is_text = laid_out.learned.copy()
        label_bytes = np.zeros(len(laid_out.tokens), dtype=np.int32)
        for segment, begin, end in zip(laid_out.segments, *_bounds(laid_out.segments), strict=True):
            if laid_out.learned[begin:end].any():
                content = turns[segment.turn].content
                ended = segment.text_ids[-1] in self.template.stop_ids(self.tokenizer)
                is_text[end - 1] = not ended
                kept = content if ended else self.tokenizer.decode(segment.text_ids)
                label_bytes[begin] = len(kept.encode())
        return ScoredDocument(laid_out.tokens, label_bytes, is_text, laid_out.learned)

    def _lay_out(self, turns: list[Turn]) -> _LaidOut:
        segments = self.template.encode(turns, self.tokenizer)
        too_long: Literal["dropped", "shortened"] | None = None
        if _length(segments) > self.sequence_length:
            segments, too_long = self._shortened(segments, turns), "shortened"
        answers = [place for place, segment in enumerate(segments) if segment.answer and turns[segment.turn].learned]
        if not answers:
            return _LaidOut([], np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_), "dropped")
        # Where a template ends an answer in several segments, they are of one turn.
        last = segments[answers[-1]].turn
        learned = [place for place in answers if self.answers == "all" or segments[place].turn == last]
        lengths = [len(segment.text_ids) for segment in segments]
        tokens = np.fromiter(chain.from_iterable(segment.text_ids for segment in segments), np.int32)
        return _LaidOut(
            segments, tokens, np.repeat([place in learned for place in range(len(segments))], lengths), too_long
        )

    def _shortened(self, segments: list[TurnTokens], turns: list[Turn]) -> list[TurnTokens]:
        if self.on_too_long == "drop":
            return []
        begins, ends = _bounds(segments)
        if self.on_too_long == "truncate":
            fitting = zip(segments, begins, strict=True)
            return [
                replace(part, text_ids=part.text_ids[: self.sequence_length - begin])
                for part, begin in fitting
                if begin < self.sequence_length
            ]
        kept = {part.turn for place, part in enumerate(segments) if part.answer and ends[place] <= self.sequence_length}
        for last in sorted((turn for turn in kept if turns[turn].learned), reverse=True):
            # Written again: a template may say something in the last exchange only, as the system's text.
            shorter = self.template.encode(turns[: last + 1], self.tokenizer)
            if _length(shorter) <= self.sequence_length:
                return shorter
        return []


class _LaidOut(NamedTuple):
    """A conversation as it fits: segments, tokens ``[n]``, whether each is learned ``[n]``, and what was done to it."""

    segments: list[TurnTokens]
    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    too_long: Literal["dropped", "shortened"] | None


def _length(segments: Sequence[TurnTokens]) -> int:
    return sum(len(segment.text_ids) for segment in segments)


def _bounds(segments: Sequence[TurnTokens]) -> tuple[list[int], list[int]]:
    """Return the places where each segment begins and ends."""
    edges = list(accumulate((len(segment.text_ids) for segment in segments), initial=0))
    return edges[:-1], edges[1:]


# A source is sampled by documents spread evenly over it, until there are this many documents or bytes.
_SAMPLED_DOCUMENTS = 32
_SAMPLED_BYTES = 1 << 18


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
