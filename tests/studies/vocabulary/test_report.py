"""Counts against SentencePiece and plain Python."""

import csv
import io
from pathlib import Path

import pytest
import sentencepiece

from lightning_mixcn.studies.tables import csv_text
from lightning_mixcn.studies.vocabulary.report import (
    CountingTokenizer,
    as_records,
    as_table,
    count_texts,
)
from tests.extended_tokenizers import HAN, extend
from tests.studies.vocabulary.vocab_data import shared, simplified_paragraphs, small_base

TEXTS = ["今天 the of\n", "中大中大", "é"]


@pytest.mark.parametrize("kind", ["folder", "model"])
def test_sums_are_those_of_sentencepiece(tmp_path: Path, kind: str) -> None:
    base = small_base(tmp_path / "base")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    ids = [index for part in processor.encode(TEXTS) for index in part]
    tokenizer = CountingTokenizer(base if kind == "folder" else base / "tokenizer.model", "small")
    (sums,) = count_texts([tokenizer], "x", TEXTS, None)
    assert (sums.documents, sums.characters, sums.bytes) == (3, 15, 15 + 2 * 6 + 1)
    assert sums.tokens == len(ids)
    assert sums.byte_tokens == sum(map(processor.is_byte, ids)) > 0
    (first,) = count_texts([tokenizer], "x", TEXTS, 1)
    assert first.documents == 1


def test_parts_of_characters_count_in_a_byte_level_tokenizer(tiny_base: Path, tmp_path: Path) -> None:
    extended = CountingTokenizer(extend(tiny_base, tmp_path / "zh", HAN, 90), "zh")
    for tokenizer, tokens, partial in ((CountingTokenizer(tiny_base, "tiny"), 7, 6), (extended, 2, 0)):
        (sums,) = count_texts([tokenizer], "x", ["今天a"], None)
        assert (sums.tokens, sums.byte_tokens) == (tokens, partial)


def test_table_and_csv_say_the_same(tmp_path: Path) -> None:
    tokenizer = CountingTokenizer(small_base(tmp_path / "base"), "small")
    counts = count_texts([tokenizer], "x", TEXTS, None) + count_texts([tokenizer], "empty", [], None)
    rows = list(csv.DictReader(io.StringIO(csv_text(as_records(counts)))))
    assert [row["source"] for row in rows] == ["x", "empty"]
    assert (
        float(rows[0]["characters_per_token"]) == as_records(counts)[0]["characters_per_token"] == 15 / counts[0].tokens
    )
    assert f"{15 / counts[0].tokens:.3f}" in as_table(counts).splitlines()[1]
    assert float(rows[1]["characters_per_token"]) == 0


def test_known_figures_of_the_papers_tokenizers() -> None:
    """Chinese-LLaMA-2's model has equal scores, so no fast tokenizer equals it: SentencePiece itself counts."""
    texts = simplified_paragraphs()[:200]
    names = ("mixtral-8x7b", "chinese-llama-2")
    tokenizers = [CountingTokenizer(shared("tokenizers", name), name) for name in names]
    expected = []
    for name in names:
        model = sentencepiece.SentencePieceProcessor(model_file=str(shared("tokenizers", name) / "tokenizer.model"))
        expected.append(sum(map(len, model.encode(texts))))
    assert [sums.tokens for sums in count_texts(tokenizers, "zh", texts, None)] == expected
    assert expected[0] > 1.4 * expected[1]


def test_a_broken_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"`tokenizer=.*` is not a SentencePiece model"):
        CountingTokenizer(tmp_path, "x")
