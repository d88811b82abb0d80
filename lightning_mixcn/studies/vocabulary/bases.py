"""Merging pieces into a BPE that is a ``tokenizer.json`` alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import UserError
from lightning_mixcn.tokenizer.begin import put_bos_first
from lightning_mixcn.tokenizer.sentencepiece import (
    BLANK,
    NORMAL,
    build_fast_tokenizer,
    read_proto,
)
from lightning_mixcn.tokenizer.tokenizer import begins_with_bos


def as_bytes(text: str) -> str:
    """Return text as a byte-level tokenizer writes it: a printable character for each UTF-8 byte (GPT-2's table)."""
    return "".join(_CHARACTERS[byte] for byte in text.encode())


def is_partial(piece: str) -> bool:
    """Tell whether a piece of a byte-level tokenizer holds bytes that are no whole characters."""
    return all(character in BYTES for character in piece) and not is_text(bytes(map(BYTES.__getitem__, piece)))


def _characters_of_bytes() -> dict[int, str]:
    """Map bytes to characters: printable ones of Latin-1 are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


_CHARACTERS = _characters_of_bytes()
BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def is_text(encoded: bytes) -> bool:
    """Tell whether bytes are whole UTF-8 characters."""
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_character(piece: str) -> bool:
    """Tell whether a piece of a byte-level tokenizer is one whole character."""
    encoded = bytes(map(BYTES.__getitem__, piece))
    return is_text(encoded) and len(encoded.decode()) == 1


class FastBase:
    """A BPE that is a ``tokenizer.json`` alone, of characters or of bytes.

    Merges of the new pieces come after all others, which has the effect of lower scores.

    Args:
        folder: With ``tokenizer.json``.

    Raises:
        ValueError: it is no BPE.
    """

    def __init__(self, folder: Path) -> None:
        """Read the file."""
        backend = read_fast(folder / "tokenizer.json")
        self._content: dict[str, Any] = json.loads(backend.to_str())
        if self._content["model"].get("type") != "BPE":
            kind = self._content["model"].get("type")
            raise UserError(f"`base_tokenizer={str(folder)!r}` is a {kind}. Pieces can be merged into a BPE only")
        self.pieces: Mapping[str, int] = dict(backend.get_vocab(with_added_tokens=True))
        self._of_bytes = (self._content.get("decoder") or {}).get("type") == "ByteLevel"

    def spelled(self, piece: str) -> str:
        """Return a character for each byte, where that is how the tokenizer works."""
        return as_bytes(piece.replace(BLANK, " ")) if self._of_bytes else piece

    def helpers(self, pieces: Sequence[str]) -> list[str]:
        """Return the first bytes of single characters that no two pieces make up."""
        found: dict[str, None] = {}
        for piece in pieces if self._of_bytes else ():
            if 2 < len(piece) <= 4 and is_character(piece) and not _splits(piece, self.pieces):
                found |= dict.fromkeys(piece[:size] for size in range(2, len(piece)))
        return [piece for piece in found if piece not in self.pieces]

    def reached(self, pieces: Sequence[str]) -> list[bool]:
        """Ask the extended tokenizer itself; of bytes with what it does to a text before."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(json.dumps(self._extended(pieces)))
        backend.encode_special_tokens = True
        if not self._of_bytes:
            return [len(backend.model.tokenize(piece)) == 1 for piece in pieces]
        texts = [bytes(map(BYTES.__getitem__, piece)) for piece in pieces]
        return [
            # The first bytes of a character are no text.
            not is_text(text) or len(backend.encode(text.decode(), add_special_tokens=False)) == 1
            for text in texts
        ]

    def write(self, folder: Path, pieces: Sequence[str]) -> None:
        """Write ``tokenizer.json``."""
        content = json.dumps(self._extended(pieces), ensure_ascii=False, indent=1)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")

    def _extended(self, pieces: Sequence[str]) -> dict[str, Any]:
        first = max(self.pieces.values()) + 1
        further = {piece: first + place for place, piece in enumerate(pieces)}
        known = self.pieces.keys() | further.keys()
        merges = [split for piece in pieces for split in reversed(_splits(piece, known))]
        model = self._content["model"]
        # Added tokens that the model lacks get, when read, the ids after its pieces: here they have their own.
        held = {token["content"]: token["id"] for token in self._content["added_tokens"]}
        model = model | {"vocab": model["vocab"] | held | further, "merges": [*model["merges"], *merges]}
        return self._content | {"model": model}


def read_fast(file: Path) -> Any:
    """Read a ``tokenizer.json``. ValueError if it is something else."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every damage
        raise UserError(f"`base_tokenizer`: {str(file)!r} is not a tokenizer.json ({error}). Copy it again") from error


def _splits(piece: str, known: Any) -> list[tuple[str, str]]:
    pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in known and right in known]


_BPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType


class SentencePieceBase:
    """A SentencePiece BPE model, Mixtral's for one.

    Its BPE merges the neighbours whose piece has the highest score, so pieces with scores below all that are there come
    last and change no text in which they do not occur. A piece that is reached in some text is reached alone, too: as
    no merge has crossed its borders, those inside it happened in the order in which they happen without neighbours.

    Args:
        folder: With ``tokenizer.model``, and perhaps ``tokenizer.json``.

    Raises:
        ValueError: it is no BPE, or ``tokenizer.json`` has other pieces.
    """

    def __init__(self, folder: Path) -> None:
        """Read both files."""
        self._proto = read_proto(folder / "tokenizer.model", "base_tokenizer")
        if self._proto.trainer_spec.model_type != _BPE:
            raise UserError(f"`base_tokenizer={str(folder)!r}` is no BPE model. Pieces can be merged into a BPE only")
        self.pieces: Mapping[str, int] = {piece.piece: index for index, piece in enumerate(self._proto.pieces)}
        self._fast = read_fast(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
        if self._fast is not None and self._fast.get_vocab(with_added_tokens=True) != self.pieces:
            raise UserError(
                f"`base_tokenizer={str(folder)!r}`: tokenizer.json has other pieces than tokenizer.model. Remove one "
                "of the two; without tokenizer.model the pieces go into tokenizer.json alone"
            )
        self._begins_with_bos = begins_with_bos(folder)
        scores = [piece.score for piece in self._proto.pieces if piece.type == NORMAL and set(piece.piece) != {BLANK}]
        self._lowest = min(scores)  # runs of blanks are lower still in Mixtral's, and overlap with nothing new

    def spelled(self, piece: str) -> str:
        """Return the text as it is."""
        return piece

    def helpers(self, pieces: Sequence[str]) -> list[str]:
        """Return none: characters are the smallest parts."""
        return []

    def reached(self, pieces: Sequence[str]) -> list[bool]:
        """Ask SentencePiece, and whether each character has a piece, without which a fast tokenizer cannot merge."""
        import sentencepiece

        proto = self._extended(pieces)
        proto.normalizer_spec.add_dummy_prefix = False
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        known = self.pieces.keys() | set(pieces)
        return [
            len(ids) == 1 and all(character in known for character in piece)
            for piece, ids in zip(pieces, processor.encode(list(pieces)), strict=True)
        ]

    def write(self, folder: Path, pieces: Sequence[str]) -> None:
        """Write both files; what tokenizer.json adds around a text is the base's."""
        (folder / "tokenizer.model").write_bytes(self._extended(pieces).SerializeToString())
        fast = build_fast_tokenizer(folder / "tokenizer.model")
        if self._fast is not None:
            fast.post_processor = self._fast.post_processor
        elif self._begins_with_bos:
            put_bos_first(fast, self._proto.pieces[self._proto.trainer_spec.bos_id].piece)
        fast.save(str(folder / "tokenizer.json"))

    def _extended(self, pieces: Sequence[str]) -> Any:
        proto = type(self._proto)()
        proto.CopyFrom(self._proto)
        for place, piece in enumerate(pieces):
            proto.pieces.add(piece=piece, score=self._lowest - 1 - place)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        return proto
