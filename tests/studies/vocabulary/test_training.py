"""SentencePiece's trainer behind a stream: what it learns, that it is the same each time, and how it fails."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lightning_mixcn.studies.vocabulary.training import (
    MAX_SENTENCE_CHARACTERS,
    corpus_files,
    iterate_texts,
    named_files,
    sentences,
    train_pieces,
)
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


def test_sentences_keep_all_but_blanks() -> None:
    long = "今天天气很好。" * 400 + "没有句号" * 600
    texts = ["  one\n\n two \r\nthree", long, "word " * 900]
    cut = list(sentences(iter(texts)))
    assert cut[:3] == ["one", "two", "three"]
    assert "".join(cut).replace(" ", "") == "".join("".join(texts).split())
    assert max(map(len, cut)) <= MAX_SENTENCE_CHARACTERS
    of_long = [part for part in cut if "今" in part]
    assert all(part.endswith("。") for part in of_long[:-1])
    assert all(not part.startswith("ord") for part in cut[3:])


def test_files_of_every_kind_without_a_copy(
    tmp_path: Path, cache_of_the_tests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(cache_of_the_tests.rglob("*"))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"content": "中文"}) + "\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "c.md").touch()
    files = corpus_files([str(tmp_path)], "content")
    (message,) = caplog.messages
    assert message.startswith("Source 'corpus': 2 files read, 1 left out: 1 with another suffix (`")
    assert list(iterate_texts(files, "reading")) == ["中文", "one", "two"]
    named = named_files([f"x={tmp_path / 'b.txt'}"], "text", "file")
    assert list(iterate_texts(named["x"], "x")) == ["one\ntwo\n"]
    assert sorted(cache_of_the_tests.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (["zh"], ValueError, "expected name=PATH"),
        (["zh=nowhere.jsonl"], FileNotFoundError, r"text\[0\].path='nowhere.jsonl'` matches no file"),
        (["zh=a.bin"], ValueError, "format of .* cannot be told"),
    ],
)
def test_bad_sources_are_refused(
    text: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.bin").write_bytes(b"x")
    with pytest.raises(error, match=message):
        named_files(text, "text", "file")
