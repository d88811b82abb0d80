"""SentencePiece BPE models as fast tokenizers, and the proof that a fast tokenizer equals its SentencePiece model.

SentencePiece merges the adjacent pair whose *piece* has the highest score, leftmost first on equal scores. A fast
tokenizer merges by the rank of the *pair*. Both agree when pairs are ranked by the score of the piece they form.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mixcn.errors import MissingFileError, UserError

if TYPE_CHECKING:
    import tokenizers


BLANK = "▁"  # SentencePiece's visible blank, U+2581
NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto, Type
_BPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType

PROBES: tuple[str, ...] = (
    "",
    "a",
    "Hello, world!",
    " leading",
    "  two leading",
    "trailing  ",
    "in  the   middle",
    "    return x\n\n\tfor i in range(10):\n        y += i  # tab\there",
    "\n",
    "\n\n leading after newline\r\n",
    "你好，世界！今天天气不错。",
    "繁體中文與简体中文混排 with English 123",
    "全角　空格",
    "😀👩‍👩‍👧 𠮷野家",
    "Ünïcödé é\u00ad\u200b\ufeff",
    "\x00\x07\x7f",
    "a\x00b",
    "<s>",
    "a<s>b</s> <unk><pad> [INST] x [/INST] <|im_start|>",
    "<0x41><0x0A>",
    "3.14159 1000000 0xFF",
    "▁visible▁▁blank",
    *(" " * n + "x" + " " * (n + 1) for n in range(1, 36)),
    *("\n" * n for n in range(2, 9)),
)
"""Texts on which tokenizers are known to go wrong: blanks, code, Chinese, emoji, byte fallback, literal specials."""


def build_fast_tokenizer(model_file: Path) -> tokenizers.Tokenizer:
    """Build the fast tokenizer of a SentencePiece BPE model with byte fallback.

    Args:
        model_file: SentencePiece's ``tokenizer.model``.

    Returns:
        A ``tokenizers.Tokenizer`` without template (no BOS is added) and without truncation.

    Raises:
        ValueError: The model is not a BPE with byte fallback and identity normalisation, or its order of merges
            cannot be written as ranks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = read_proto(model_file)
    _require_plain_bpe(model_file, proto)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(vocab, _ranked_merges(model_file, proto), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend(BLANK)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


def special_pieces(model_file: Path) -> dict[str, str]:
    """Read the names of the special pieces of a SentencePiece model.

    Args:
        model_file: SentencePiece's ``tokenizer.model``.

    Returns:
        ``bos_token``, ``eos_token`` and ``unk_token``, each where the model has one.
    """
    proto = read_proto(model_file)
    spec = proto.trainer_spec
    indices = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    return {name: proto.pieces[index].piece for name, index in indices.items() if 0 <= index < len(proto.pieces)}


def check_against_sentencepiece(encode: Callable[[list[str]], list[list[int]]], model_file: Path, remedy: str) -> None:
    """Raise unless `encode` gives SentencePiece's ids on `PROBES`, on every piece and on 4,096 seeded mixtures of them.

    Args:
        encode: Texts to ids, without special tokens.
        model_file: SentencePiece's ``tokenizer.model``, the reference.
        remedy: Advice for the error, if they differ.

    Raises:
        ValueError: A probe differs; the message shows it with both results.
    """
    proto = read_proto(model_file)
    probes = [*PROBES, *_vocabulary_probes(proto)]
    for probe, ours, theirs in zip(probes, encode(probes), processor_of(proto).encode(probes), strict=True):
        if ours != theirs:
            raise UserError(
                f"The tokenizer of `{model_file.parent}` differs from SentencePiece's {model_file.name} on {probe!r}: "
                f"got ids {ours[:16]}, expected {theirs[:16]}. {remedy}"
            )


def _vocabulary_probes(proto: Any) -> list[str]:
    """List every ordinary piece as text, and seeded concatenations of eight: they reach merges no fixed text would."""
    pieces = [piece.piece.replace(BLANK, " ") for piece in proto.pieces if piece.type == NORMAL]
    draw = random.Random(0)
    return pieces + ["".join(draw.choices(pieces, k=8)) for _ in range(4096)]


def _require_plain_bpe(model_file: Path, proto: Any) -> None:
    """Refuse what the fast tokenizer built here would encode otherwise than SentencePiece."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    types = [piece.type for piece in proto.pieces]
    reasons = {
        "it is not a BPE model": trainer.model_type != _BPE,
        "it has no byte fallback": types.count(_BYTE) != 256,
        "it normalises text": bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces,
        "it marks blanks as suffixes": trainer.treat_whitespace_as_suffix,
        "it has user-defined or unused pieces": _USER_DEFINED in types or _UNUSED in types,
        "it has not one unknown piece": types.count(_UNKNOWN) != 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"`{model_file}` cannot be turned into a fast tokenizer: {reason}. Put a tokenizer.json beside it; "
                "the two are then compared."
            )


def _ranked_merges(model_file: Path, proto: Any) -> list[tuple[str, str]]:
    """List all binary splits of all pieces, in the order in which SentencePiece prefers them.

    Pieces with equal score are merged leftmost first by SentencePiece, which ranks cannot say, except for runs of
    blanks: these only ever grow from the left, so the longest left part comes first.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merged = [piece for piece in scores if len(piece) > 1 and _splits(piece, scores)]
    _refuse_equal_scores(model_file, merged, scores)
    splits = ((left, right) for piece in merged for left, right in _splits(piece, scores))
    return sorted(splits, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))


def _splits(piece: str, scores: dict[str, float]) -> list[tuple[str, str]]:
    pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in scores and right in scores]


def _refuse_equal_scores(model_file: Path, pieces: Sequence[str], scores: dict[str, float]) -> None:
    seen: dict[float, str] = {}
    for piece in pieces:
        if set(piece) == {BLANK}:
            continue
        other = seen.setdefault(scores[piece], piece)
        if other != piece:
            raise UserError(
                f"`{model_file}` gives the pieces {other!r} and {piece!r} the same score {scores[piece]}: the order of "
                "their merges depends on their place in the text, which a fast tokenizer cannot do. "
                "Rebuild the model with distinct scores, falling in the order of the ids."
            )


def read_proto(file: Path, argument: str | None = None) -> Any:
    """Read the protobuf of a SentencePiece model.

    Args:
        file: ``tokenizer.model`` or the like.
        argument: Argument that named the file, for errors; None for a file of a folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is something else.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    name = f"`{argument}={str(file)!r}`" if argument else f"`{file}`"
    if not file.is_file():
        raise MissingFileError(f"{name} is not there. Give a SentencePiece model, e.g. pieces.model")
    content = file.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    try:
        # The processor refuses more than the parser: an empty file is a protobuf, too.
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(content)
        proto.ParseFromString(content)
    except Exception as error:  # protobuf has an exception of its own
        raise UserError(
            f"{name} is not a SentencePiece model. Give one that `mixcn vocab train` wrote, or the tokenizer.model of "
            "a checkpoint; if it was one, get it again"
        ) from error
    return proto


def processor_of(proto: Any) -> Any:
    """Make SentencePiece's own tokenizer of the protobuf of a model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def read_pieces(path: str) -> list[str]:
    """Read the ordinary pieces of a SentencePiece model, in its order: neither special ones nor single bytes.

    Args:
        path: Model, or folder with ``tokenizer.model``.
    """
    place = Path(path).expanduser()
    proto = read_proto(place / "tokenizer.model" if place.is_dir() else place, "pieces")
    return [piece.piece for piece in proto.pieces if piece.type == NORMAL]
