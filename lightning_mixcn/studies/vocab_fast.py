"""Merging pieces into a BPE that is a ``tokenizer.json`` alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mixcn.text.sentencepiece_bpe import BLANK

from .vocab_bytes import BYTES, as_bytes, is_character, is_text


class FastBase:
    """A BPE that is a ``tokenizer.json`` alone, of characters or of bytes.

    Merges of the new pieces stand behind all others, which has the effect of lower scores.

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
            raise ValueError(f"`base_tokenizer={str(folder)!r}` is a {kind}. Pieces can be merged into a BPE only")
        self.pieces: Mapping[str, int] = dict(backend.get_vocab(with_added_tokens=True))
        self._of_bytes = (self._content.get("decoder") or {}).get("type") == "ByteLevel"

    def spelled(self, piece: str) -> str:
        """A character for each byte, where that is how the tokenizer works."""
        return as_bytes(piece.replace(BLANK, " ")) if self._of_bytes else piece

    def helpers(self, pieces: Sequence[str]) -> list[str]:
        """The first bytes of single characters that no two pieces make up."""
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
        model = model | {"vocab": model["vocab"] | further, "merges": [*model["merges"], *merges]}
        return self._content | {"model": model}


def read_fast(file: Path) -> Any:
    """Read a ``tokenizer.json``. ValueError if it is something else."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every damage
        raise ValueError(f"`base_tokenizer`: {str(file)!r} is not a tokenizer.json ({error}). Copy it again") from error


def _splits(piece: str, known: Any) -> list[tuple[str, str]]:
    pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in known and right in known]
