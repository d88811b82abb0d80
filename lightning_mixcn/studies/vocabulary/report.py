"""How well a tokenizer fits a text: characters a token, and the share of tokens that are single bytes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_mixcn.errors import MissingFileError
from lightning_mixcn.studies.tables import aligned
from lightning_mixcn.text import load_tokenizer
from lightning_mixcn.tokenizer.pieces import TokenizerPieces, has_tokenizer
from lightning_mixcn.tokenizer.sentencepiece import read_proto

from .bases import is_partial

_BATCH_CHARACTERS = 1 << 20


@dataclass
class TokenCounts:
    """Sums over a text.

    Args:
        tokenizer: Name of the tokenizer.
        pieces: Number of its pieces.
        source: Name of the text.
        documents: Documents counted.
        characters: Unicode characters of them.
        bytes: UTF-8 bytes of them.
        tokens: Tokens, without BOS and EOS.
        byte_tokens: Tokens that are no whole characters: SentencePiece's byte fallback (Mixtral has no piece for a
            newline, so each is one of them), or a part of a character in a byte-level tokenizer.
    """

    tokenizer: str
    pieces: int
    source: str
    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    byte_tokens: int = 0

    def ratios(self) -> dict[str, float]:
        """Divide the sums, once."""
        tokens = max(1, self.tokens)
        return {
            "characters_per_token": self.characters / tokens,
            "bytes_per_token": self.bytes / tokens,
            "byte_fallback_share": self.byte_tokens / tokens,
        }


class CountingTokenizer:
    """Counts tokens; made of any folder with a tokenizer, or of a SentencePiece model.

    What `load_tokenizer` takes is encoded by it. A folder, or file, that is a SentencePiece model alone is encoded by
    SentencePiece itself, which also knows models that no fast tokenizer equals.

    Args:
        path: Folder or ``.model`` file.
        name: In the report.

    Raises:
        FileNotFoundError: no such tokenizer.
        ValueError: it is broken.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Load it."""
        self.name = name
        model = path if path.is_file() else path / "tokenizer.model"
        if (path / "tokenizer.json").is_file():
            self._encode: Callable[[list[str]], list[list[int]]] = load_tokenizer(path).encode_batch
            known = TokenizerPieces(path)
            pieces, of_bytes = known.pieces, known.is_byte_level
        elif path.is_dir() and not model.is_file():
            of_run = f"{str(path / 'adapter')!r}, the run's adapter" if has_tokenizer(path / "adapter") else None
            raise MissingFileError(
                f"`tokenizer={str(path)!r}` has neither tokenizer.json nor tokenizer.model. Give "
                f"{of_run or 'the folder of a tokenizer or of a model that has one'}, or a SentencePiece model"
            )
        else:
            import sentencepiece

            proto = read_proto(model, "tokenizer")
            self._encode = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
            pieces, of_bytes = [piece.piece for piece in proto.pieces], False
        fallback = {f"<0x{byte:02X}>" for byte in range(256)}
        self.pieces = len(pieces)
        self._is_byte: NDArray[np.bool_] = np.array(
            [piece in fallback or (of_bytes and piece is not None and is_partial(piece)) for piece in pieces]
        )

    def count(self, texts: Sequence[str], counts: TokenCounts) -> None:
        """Add texts to sums."""
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in self._encode(list(texts))])
        counts.documents += len(texts)
        counts.characters += sum(map(len, texts))
        counts.bytes += sum(len(text.encode()) for text in texts)
        counts.tokens += len(ids)
        counts.byte_tokens += int(self._is_byte[ids].sum())


def count_texts(
    tokenizers: Sequence[CountingTokenizer], source: str, texts: Iterable[str], max_documents: int | None
) -> list[TokenCounts]:
    """Count one source with every tokenizer; the text is read once."""
    counts = [TokenCounts(tokenizer.name, tokenizer.pieces, source) for tokenizer in tokenizers]
    for batch in _batches(islice(texts, max_documents)):
        for tokenizer, sums in zip(tokenizers, counts, strict=True):
            tokenizer.count(batch, sums)
    return counts


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def as_table(counts: Sequence[TokenCounts]) -> str:
    """Return a line for each tokenizer and source, aligned."""
    header = ["tokenizer", "pieces", "source", "characters/token", "bytes/token", "byte fallback", "tokens"]
    rows = []
    for sums in counts:
        of = sums.ratios()
        figures = [f"{of['characters_per_token']:.3f}", f"{of['bytes_per_token']:.3f}"]
        share = f"{of['byte_fallback_share']:.2%}"
        rows.append([sums.tokenizer, f"{sums.pieces:,}", sums.source, *figures, share, f"{sums.tokens:,}"])
    return aligned([header, *rows], left=(0, 2))


def as_records(counts: Sequence[TokenCounts]) -> list[dict[str, str | int | float]]:
    """Return sums and ratios, for JSON and CSV."""
    return [asdict(sums) | sums.ratios() for sums in counts]
