"""Two answers to a prompt as tokens: each after the prompt, isolated from the other, in one row."""

# n = tokens of a document

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lightning_mixcn.text.chat.preferences import Preference, load_preference
from lightning_mixcn.text.chat.turns import Turn

from .encoders import EncodedDocument, ScoredDocument

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_mixcn.text.chat.turns import ChatTemplate
    from lightning_mixcn.tokenizer.tokenizer import TextTokenizer

TooLongPairPolicy = Literal["drop", "truncate"]


@dataclass(frozen=True)
class Preferences:
    """Encoder of preferences by a chat template: ``prompt answer prompt answer``, the answers and their ends labels.

    The two are one document of a corpus, which stays in one row, and two documents of that row, which do not see each
    other: the first has an even ``document_ids``, the second the odd one after it.

    Args:
        template: Chat template of the prompts and answers.
        tokenizer: Tokenizer of the model.
        sequence_length: Tokens of a row, which no pair exceeds.
        on_too_long: Treatment of a longer pair: `drop` drops it, `truncate` keeps the beginning of each side, of half a
            row or more, so that the end of an answer is not learned. One that leaves a side no answer is dropped.
    """

    template: ChatTemplate
    tokenizer: TextTokenizer
    sequence_length: int
    on_too_long: TooLongPairPolicy = "drop"
    keeps_whole = True
    has_sides = True

    @property
    def fingerprint(self) -> dict[str, str]:
        """Tokenizer and template, as digests, and the choice."""
        template = hashlib.blake2b(repr(self.template).encode(), digest_size=16).hexdigest()
        return {"tokenizer": self.tokenizer.fingerprint, "template": template, "on_too_long": self.on_too_long}

    @property
    def padding_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_id

    def encode(self, text: str) -> EncodedDocument:
        """Encode a preference of a corpus as ``[n]``; one that the template refuses has no tokens."""
        try:
            sides, too_long = self._lay_out(load_preference(text))
        except ValueError as error:
            return EncodedDocument(np.zeros(0, np.int32), np.zeros(0, np.bool_), refused=str(error))
        tokens, learned = _joined(sides)
        return EncodedDocument(tokens, learned, too_long, parts=_parts(sides))

    def score(self, texts: Sequence[str]) -> list[ScoredDocument]:
        """Encode preferences; the bytes of an answer are credited to its first token."""
        return [self._score(text) for text in texts]

    def refusal(self, text: str) -> str | None:
        """Return the reason why the template refuses a preference, or None."""
        preference = load_preference(text)
        try:
            for answer in preference.answers:
                self.template.check_conversation([*preference.prompt, Turn("assistant", answer.text)], self.tokenizer)
        except ValueError as error:
            return str(error)
        return None

    def _score(self, text: str) -> ScoredDocument:
        encoded = self.encode(text)
        label_bytes = np.zeros(len(encoded.tokens), dtype=np.int32)
        is_text = np.zeros(len(encoded.tokens), dtype=np.bool_) if encoded.learned is None else encoded.learned.copy()
        start = 0
        for length, _ in encoded.parts:
            part = slice(start, start + length)
            own = np.flatnonzero(is_text[part]) + start
            ids = encoded.tokens[own].tolist()
            ended = ids[-1] in self.template.stop_ids(self.tokenizer)
            is_text[own[-1]] = not ended
            label_bytes[own[0]] = self.tokenizer.num_bytes(ids)
            start += length
        return ScoredDocument(
            encoded.tokens, label_bytes, is_text, encoded.learned, refused=encoded.refused, parts=encoded.parts
        )

    def _lay_out(self, preference: Preference) -> tuple[list[_Side], Literal["dropped", "shortened"] | None]:
        sides = [self._side(preference, answer.text, answer.side) for answer in preference.answers]
        lengths = [len(side.tokens) for side in sides]
        if sum(lengths) <= self.sequence_length:
            return sides, None
        half, shortest = self.sequence_length // 2, min(lengths)
        room = half if shortest > half else self.sequence_length - shortest
        kept = [_Side(side.tokens[:room], side.learned[:room], side.side) for side in sides]
        if self.on_too_long == "drop" or not all(side.learned.any() for side in kept):
            return [], "dropped"
        return kept, "shortened"

    def _side(self, preference: Preference, answer: str, side: int) -> _Side:
        turns = [*preference.prompt, Turn("assistant", answer)]
        segments = self.template.encode(turns, self.tokenizer)
        tokens = np.fromiter(chain.from_iterable(segment.text_ids for segment in segments), np.int32)
        # Where a template ends an answer in several segments, they are of one turn.
        own = [segment.answer and segment.turn == len(turns) - 1 for segment in segments]
        return _Side(tokens, np.repeat(own, [len(segment.text_ids) for segment in segments]), side)


class _Side(NamedTuple):
    """Prompt and answer: tokens ``[n]``, the mask of the answer's ``[n]``, and the answer's side."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    side: int


def _joined(sides: Sequence[_Side]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    if not sides:
        return np.zeros(0, np.int32), np.zeros(0, np.bool_)
    return np.concatenate([side.tokens for side in sides]), np.concatenate([side.learned for side in sides])


def _parts(sides: Sequence[_Side]) -> tuple[tuple[int, int], ...]:
    return tuple((len(side.tokens), side.side) for side in sides)
