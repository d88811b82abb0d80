"""SentencePiece's trainer behind a stream: what it learns, that it is the same each time, and how it fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lightning_mixcn.studies.vocabulary.training import train_pieces
from lightning_mixcn.tokenizer.sentencepiece import read_pieces

LINES = ["привет мир сегодня хорошая погода", "книга читать люди город", "привет люди мир город"] * 20


def train(lines: Iterator[str], **changes: Any) -> bytes:
    settings: dict[str, Any] = {
        "vocab_size": 80, "model_type": "bpe", "character_coverage": 1.0, "max_piece_characters": 16,
        "max_sentences": 0, "seed": 0,
    }  # fmt: skip
    return train_pieces(lines, **(settings | changes))


@pytest.mark.parametrize(("model_type", "size"), [("bpe", 60), ("unigram", 28)])
def test_pieces_are_of_the_text_and_the_same_each_time(model_type: Any, size: int, tmp_path: Path) -> None:
    model = train(iter(LINES), model_type=model_type, vocab_size=size)
    assert model == train(iter(LINES), model_type=model_type, vocab_size=size)
    (tmp_path / "x.model").write_bytes(model)
    pieces = read_pieces(str(tmp_path / "x.model"))
    assert len(pieces) == size - 3
    assert all(piece.replace("▁", " ") in f" {' '.join(LINES)}" for piece in pieces)
    if model_type == "bpe":
        assert {"▁мир", "▁привет", "▁город"} <= set(pieces)
    # Not normalised, as Mixtral's: a ligature stays one character, which has no piece.
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.encode("ﬁ", out_type=str) == ["▁", "ﬁ"]


def test_a_sample_is_drawn_by_the_seed() -> None:
    lines = [f"{word} {number}" for number in range(300) for word in ("книга", "город", "слово")]
    one, again = (train(iter(lines), max_sentences=200, vocab_size=45) for _ in range(2))
    assert one == again


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"cannot make 5000 pieces of 60 sentences: Vocabulary size too high .*Choose another `vocab_size`",
    ):
        train(iter(LINES), vocab_size=5000, model_type="unigram")
    with pytest.raises(ValueError, match=r"cannot make 5000 pieces of 60 sentences"):
        train(iter(LINES), vocab_size=5000)
    with pytest.raises(ValueError, match="`corpus` holds no text"):
        train(iter([]))

    def broken() -> Iterator[str]:
        yield "привет"
        raise ValueError("`a.jsonl` line 2 is not JSON")

    with pytest.raises(ValueError, match="line 2 is not JSON"):
        train(broken())
    (tmp_path / "no.model").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"`pieces=.*no.model'` is not a SentencePiece model"):
        read_pieces(str(tmp_path / "no.model"))
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_pieces(str(tmp_path / "nowhere.model"))
