"""SentencePiece models as data: training one, and reading the pieces of one."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

ModelType = Literal["bpe", "unigram"]
NORMAL = 1  # sentencepiece_model.proto, Type


def train_pieces(
    lines: Iterator[str],
    *,
    vocab_size: int,
    model_type: ModelType,
    character_coverage: float,
    max_piece_characters: int,
    max_sentences: int,
    seed: int,
) -> bytes:
    """Train SentencePiece on sentences as they come.

    Args:
        lines: The sentences.
        vocab_size: Pieces, the three special ones included.
        model_type: ``bpe`` or ``unigram``.
        character_coverage: Share of the characters of the text that get a piece.
        max_piece_characters: Characters of the longest piece.
        max_sentences: Sentences drawn at random from all, more than 100; 0 takes all.
        seed: Of that draw.

    Returns:
        The serialised model. Text is not normalised, as in Mixtral's own.

    Raises:
        ValueError: SentencePiece cannot make such a model of this text, or there is none.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    model, counted = io.BytesIO(), _Counted(lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=counted,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            max_sentencepiece_length=max_piece_characters,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=bool(max_sentences),
            normalization_rule_name="identity",
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if counted.error is not None:
            raise counted.error from None
        if not counted.count:
            raise ValueError("`corpus` holds no text: every document is empty. Give files with text") from error
        says = re.sub(r"^.*\] *", "", str(error)).rstrip(". ") or str(error)  # behind its own file and condition
        raise ValueError(
            f"SentencePiece cannot make {vocab_size} pieces of {counted.count:,} sentences: {says}. Choose another "
            "`vocab_size`, or give more text"
        ) from error
    return model.getvalue()


class _Counted:
    """Counts what an iterator gives, and keeps its error, which SentencePiece would replace with one of its own."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self.count = lines, 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise StopIteration from None
        self.count += 1
        return line


def read_proto(file: Path, argument: str) -> Any:
    """Read the protobuf of a SentencePiece model.

    Args:
        file: ``tokenizer.model`` or the like.
        argument: What the person gave it as, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    if not file.is_file():
        raise FileNotFoundError(
            f"`{argument}={str(file)!r}` is not there. Give a SentencePiece model, e.g. pieces.model"
        )
    content = file.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(content)
        proto.ParseFromString(content)
    except Exception as error:  # protobuf has an exception of its own
        raise ValueError(
            f"`{argument}={str(file)!r}` is not a SentencePiece model. Give one that `mixcn vocab train` wrote, or the "
            "tokenizer.model of a checkpoint"
        ) from error
    return proto


def read_pieces(path: str) -> list[str]:
    """The ordinary pieces of a SentencePiece model, in its order: neither special ones nor single bytes.

    Args:
        path: The model, or a folder with ``tokenizer.model``.
    """
    place = Path(path).expanduser()
    proto = read_proto(place / "tokenizer.model" if place.is_dir() else place, "pieces")
    return [piece.piece for piece in proto.pieces if piece.type == NORMAL]
