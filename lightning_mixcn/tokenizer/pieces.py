"""The pieces of a checkpoint's tokenizer, and what its own merges make of any other piece."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import MissingFileError, UserError

from .sentencepiece import BLANK, processor_of, read_proto

_FILES = ("tokenizer.json", "tokenizer.model")


class TokenizerPieces:
    """Pieces by id, read from ``tokenizer.json`` or, where there is none, ``tokenizer.model``.

    A piece is split as it is, without the blank that some tokenizers put in front of a text.

    Args:
        folder: Folder with one of the two files.

    Attributes:
        folder: The folder.
        pieces: The piece of each id; ``None`` where an id has none.

    Raises:
        FileNotFoundError: The folder has neither file.
        ValueError: The file is no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        """Read the vocabulary."""
        self.folder = folder
        if not has_tokenizer(folder):
            raise MissingFileError(f"{str(folder)!r} has neither {' nor '.join(_FILES)}. Copy one there")
        if (folder / _FILES[0]).is_file():
            vocabulary, self._split, self.is_byte_level = _of_tokenizers(folder / _FILES[0])
        else:
            vocabulary, self._split, self.is_byte_level = _of_sentencepiece(folder / _FILES[1])
        self.pieces: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for piece, index in vocabulary.items():
            self.pieces[index] = piece

    def __len__(self) -> int:
        """Count the ids, the highest one and those without a piece included."""
        return len(self.pieces)

    def split(self, piece: str) -> list[int]:
        """Split a string as the tokenizer's merges do, into ids; single bytes where it has no better."""
        return self._split(piece)

    def num_bytes(self, index: int) -> int:
        """Count the UTF-8 bytes of text that a piece is written for: one for a byte's piece or a visible blank."""
        piece = self.pieces[index] or ""
        if piece in self._byte_pieces:
            return 1
        # A byte-level tokenizer writes every byte as a character.
        return len(piece) if self.is_byte_level else len(piece.replace(BLANK, " ").encode())

    @cached_property
    def _byte_pieces(self) -> set[str]:
        return {f"<0x{byte:02X}>" for byte in range(256)}


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer that `TokenizerPieces` reads."""
    return any((folder / name).is_file() for name in _FILES)


Vocabulary = tuple[dict[str, int], Callable[[str], list[int]], bool]


def _of_tokenizers(file: Path) -> Vocabulary:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every damage
        raise UserError(f"{str(file)!r} is not a tokenizer.json ({error}). Copy it again") from error
    decoder: dict[str, Any] = json.loads(backend.to_str()).get("decoder") or {}

    def split(piece: str) -> list[int]:
        # The model alone: neither its normaliser nor its pre-tokenizer changes a piece.
        return [int(token.id) for token in backend.model.tokenize(piece)]

    return backend.get_vocab(with_added_tokens=True), split, decoder.get("type") == "ByteLevel"


def _of_sentencepiece(file: Path) -> Vocabulary:
    proto = read_proto(file)
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return {piece.piece: index for index, piece in enumerate(proto.pieces)}, processor_of(proto).encode, False
