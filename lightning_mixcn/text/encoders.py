"""How a document becomes tokens, and which of them are learnt from: the seam between streams and kinds of text."""

# n = tokens of a document

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_mixcn.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document as tokens.

    Args:
        tokens: Token ids ``[n]``, int32; none if the document was dropped.
        learnt: Whether each token is learnt from ``[n]``, bool; None learns from all.
        too_long: What was done to a document that is longer than a row, if anything was.
        refused: Why the document cannot be encoded, if it cannot; it has no tokens then.
    """

    tokens: NDArray[np.int32]
    learnt: NDArray[np.bool_] | None = None
    too_long: Literal["dropped", "shortened"] | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """A document as tokens, and what its likelihood is counted in.

    Args:
        tokens: Token ids ``[n]``, int32; none if the document was dropped.
        label_bytes: UTF-8 bytes credited to each token ``[n]``, int32.
        is_text: Whether each token is text, and no control token, ``[n]``, bool.
        learnt: Whether each token is scored ``[n]``, bool; None scores all.
        refused: Why the document cannot be encoded, if it cannot; it has no tokens then.
    """

    tokens: NDArray[np.int32]
    label_bytes: NDArray[np.int32]
    is_text: NDArray[np.bool_]
    learnt: NDArray[np.bool_] | None = None
    refused: str | None = None


class DocumentEncoder(Protocol):
    """What makes tokens of the documents of a run."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Names and values of all that the tokens depend on; a run goes on only if they are the same."""

    @property
    def padding_id(self) -> int:
        """Token id under the padding."""

    @property
    def keeps_whole(self) -> bool:
        """Whether rows must not cut a document; no document is longer than a row then."""

    def encode(self, text: str) -> EncodedDocument:
        """Encode a document of a corpus."""

    def score(self, texts: Sequence[str]) -> list[ScoredDocument]:
        """Encode documents for evaluation."""


@dataclass(frozen=True)
class PlainText:
    """Documents that are learnt from whole, as ``BOS text EOS``.

    Args:
        tokenizer: The tokenizer.
    """

    tokenizer: TextTokenizer
    keeps_whole = False

    @property
    def fingerprint(self) -> dict[str, str]:
        """The tokenizer's."""
        return {"tokenizer": self.tokenizer.fingerprint}

    @property
    def padding_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_id

    def encode(self, text: str) -> EncodedDocument:
        """Encode a text as ``[tokens + 2]``."""
        (ids,) = self.tokenizer.encode_batch([text])
        tokens = np.empty(len(ids) + 2, dtype=np.int32)
        tokens[0], tokens[1:-1], tokens[-1] = self.tokenizer.bos_id, ids, self.tokenizer.eos_id
        return EncodedDocument(tokens)

    def score(self, texts: Sequence[str]) -> list[ScoredDocument]:
        """Encode texts; a text's bytes are shared out over its tokens, and EOS stands for none."""
        scored = []
        for ids, widths in self.tokenizer.encode_batch_with_bytes(texts):
            tokens = np.concatenate([[self.tokenizer.bos_id], ids, [self.tokenizer.eos_id]]).astype(np.int32)
            is_text = np.ones(len(tokens), dtype=np.bool_)
            is_text[[0, -1]] = False
            scored.append(ScoredDocument(tokens, np.pad(widths, 1), is_text))
        return scored
