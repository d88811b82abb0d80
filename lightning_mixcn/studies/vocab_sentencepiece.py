"""Merging pieces into a SentencePiece BPE model, Mixtral's for one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mixcn.text.sentencepiece_bpe import BLANK, build_fast_tokenizer

from .vocab_fast import read_fast
from .vocab_pieces import NORMAL, read_proto

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
            raise ValueError(f"`base_tokenizer={str(folder)!r}` is no BPE model. Pieces can be merged into a BPE only")
        self.pieces: Mapping[str, int] = {piece.piece: index for index, piece in enumerate(self._proto.pieces)}
        self._fast = read_fast(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
        if self._fast is not None and self._fast.get_vocab(with_added_tokens=True) != self.pieces:
            raise ValueError(
                f"`base_tokenizer={str(folder)!r}`: tokenizer.json has other pieces than tokenizer.model. Remove one "
                "of the two; without tokenizer.model the pieces go into tokenizer.json alone"
            )
        scores = [piece.score for piece in self._proto.pieces if piece.type == NORMAL and set(piece.piece) != {BLANK}]
        self._lowest = min(scores)  # runs of blanks are lower still in Mixtral's, and overlap with nothing new

    def spelled(self, piece: str) -> str:
        """As it is."""
        return piece

    def helpers(self, pieces: Sequence[str]) -> list[str]:
        """None: characters are the smallest parts."""
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
        fast.post_processor = _bos_first(self._proto) if self._fast is None else self._fast.post_processor
        fast.save(str(folder / "tokenizer.json"))

    def _extended(self, pieces: Sequence[str]) -> Any:
        proto = type(self._proto)()
        proto.CopyFrom(self._proto)
        for place, piece in enumerate(pieces):
            proto.pieces.add(piece=piece, score=self._lowest - 1 - place)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        return proto


def _bos_first(proto: Any) -> Any:
    """BOS in front of a text, as SentencePiece models of this family are used."""
    from tokenizers import processors

    bos = proto.pieces[proto.trainer_spec.bos_id].piece
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, proto.trainer_spec.bos_id)]
    )
