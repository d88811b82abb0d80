"""Merging into Mixtral's real tokenizer: old languages as before, Chinese in fewer tokens, fast as SentencePiece."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers

from lightning_mixcn.studies.vocabulary.merge import (
    REPORT,
    choose_pieces,
    mergeable_base,
    write_tokenizer,
)
from lightning_mixcn.studies.vocabulary.scripts import ScriptFilter
from lightning_mixcn.text import load_tokenizer
from lightning_mixcn.tokenizer.sentencepiece import read_pieces
from tests.extended_tokenizers import CYRILLIC, HAN, write_pieces
from tests.studies.vocabulary.vocab_data import english_and_code, shared, simplified_paragraphs, small_base


def merged(base: Path, out: Path, pieces: list[str], script: str = "Han", **options: Any) -> dict[str, Any]:
    """Merge; gives the report."""
    tokenizer = mergeable_base(base)
    chosen = choose_pieces(tokenizer, pieces, ScriptFilter(script), **options)
    write_tokenizer(base, tokenizer, chosen, script, out)
    report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return report


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Mixtral's tokenizer, and it with the pieces of a Chinese unigram model."""
    base, out = shared("tokenizers", "mixtral-8x7b"), tmp_path_factory.mktemp("real") / "zh"
    merged(base, out, read_pieces(str(shared("tokenizers", "chinese_sp.model"))))
    return base, out


def processor(folder: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_english_and_code_tokenize_as_before(real: tuple[Path, Path]) -> None:
    lines = english_and_code(10_000)
    old, new = (processor(folder).encode(lines) for folder in real)
    assert old == new
    assert load_tokenizer(real[1]).encode_batch(lines) == old


def test_chinese_takes_fewer_tokens(real: tuple[Path, Path]) -> None:
    texts = simplified_paragraphs()
    expected = processor(real[1]).encode(texts)
    assert load_tokenizer(real[1]).encode_batch(texts) == expected  # the fast tokenizer equals SentencePiece
    characters = sum(map(len, texts))
    assert characters / sum(map(len, expected)) >= 1.30
    assert characters / sum(map(len, processor(real[0]).encode(texts))) < 0.90
    known: Any = transformers.AutoTokenizer.from_pretrained(real[1])
    assert known(texts[:5])["input_ids"] == [[1, *ids] for ids in expected[:5]]


def test_old_pieces_keep_their_ids_and_new_ones_are_reached(real: tuple[Path, Path]) -> None:
    old, new = map(processor, real)
    assert [new.id_to_piece(index) for index in range(32_000)] == [old.id_to_piece(index) for index in range(32_000)]
    report = json.loads((real[1] / REPORT).read_text(encoding="utf-8"))
    assert new.get_piece_size() == report["pieces"] == 32_000 + report["added"]
    further = [new.id_to_piece(index) for index in range(32_000, new.get_piece_size())]
    assert len(set(further)) == len(further)
    names = {unicodedata.name(character).split("-")[0] for piece in further for character in piece}
    # U+2581 is the blank in front.
    assert names <= {
        "CJK UNIFIED IDEOGRAPH",
        "LOWER ONE EIGHTH BLOCK",
        "IDEOGRAPHIC NUMBER ZERO",
        "IDEOGRAPHIC ITERATION MARK",
    }
    # After a letter, so that no blank comes in front of the piece.
    encoded = new.encode([f"q{piece}" for piece in further if not piece.startswith("▁")])
    plain = [index for index, piece in enumerate(further, 32_000) if not piece.startswith("▁")]
    assert [ids[-1] for ids in encoded] == plain
    assert "越来越" in report["unreachable"]
    counts = ("already_there", "other_script", "beyond_max", "added")
    assert sum(report[name] for name in counts) + len(report["unreachable"]) == report["candidates"]


def test_unreachable_pieces_can_be_completed(tmp_path: Path) -> None:
    """甲乙丙 has no two parts that are pieces."""
    base = small_base(tmp_path / "base")
    pieces = ["甲乙丙", "丁戊", *"甲乙丙丁戊", "中大", "的", "the", "丁戊"]
    dropped = merged(base, tmp_path / "dropped", pieces)
    assert dropped["unreachable"] == ["甲乙丙"]
    assert (dropped["added"], dropped["already_there"], dropped["other_script"]) == (7, 2, 1)
    completed = merged(base, tmp_path / "completed", pieces, unreachable="complete")
    assert (completed["unreachable"], completed["helpers"]) == ([], 1)
    for name, expected in (("dropped", ["▁", "甲", "乙", "丙", "丁戊"]), ("completed", ["▁", "甲乙丙", "丁戊"])):
        assert processor(tmp_path / name).encode("甲乙丙丁戊", out_type=str) == expected
        load_tokenizer(tmp_path / name)


def test_only_a_part_of_the_pieces(tmp_path: Path) -> None:
    """The first ones, with the characters that they are made of, which stand behind them."""
    base = small_base(tmp_path / "base")
    report = merged(base, tmp_path / "out", ["甲乙", "丙丁", "甲", "乙", "丙", "丁"], max_pieces=4)
    assert (report["added"], report["unreachable"], report["beyond_max"]) == (3, [], 3)
    assert processor(tmp_path / "out").encode("甲乙", out_type=str) == ["▁", "甲乙"]
    load_tokenizer(tmp_path / "out")


def test_another_language(tmp_path: Path) -> None:
    """Cyrillic pieces, of words with blanks, into a base that has no Cyrillic letter; Chinese and English stay."""
    base = small_base(tmp_path / "base")
    pieces = read_pieces(str(write_pieces(tmp_path / "ru.model", CYRILLIC, 120, between=" ")))
    merged(base, tmp_path / "ru", pieces, "Cyrillic")
    texts = ["привет мир", "the 中 of\n  def self", "это город и the 中 大"]
    old, new = (processor(folder).encode(texts) for folder in (base, tmp_path / "ru"))
    assert old[1] == new[1]
    assert len(new[0]) == 2 < len(old[0])
    assert load_tokenizer(tmp_path / "ru").encode_batch(texts) == new
    assert processor(tmp_path / "ru").decode(new[2]) == texts[2]


@pytest.mark.parametrize("kept", ["tokenizer.model", "both"])
def test_blanks_and_bos_are_the_bases(tmp_path: Path, kept: str) -> None:
    base = small_base(tmp_path / "base")
    if kept == "both":
        load_tokenizer(base).hf.save_pretrained(base)
    merged(base, tmp_path / "zh", read_pieces(str(write_pieces(tmp_path / "zh.model", HAN, 80))))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "zh")
    for text in ("  two  blanks\n\n今天", "<s>今天</s>", "a 北京 b"):
        expected = processor(tmp_path / "zh").encode(text)
        got = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert got == [1, *expected]


def test_nothing_new_is_refused(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    with pytest.raises(
        ValueError, match="has nothing new: of 3 pieces 1 are of another script, 1 in the base already, 1 "
    ):
        merged(base, tmp_path / "out", ["的", "the", "甲乙"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.model nor tokenizer.json"):
        mergeable_base(tmp_path / "empty")
