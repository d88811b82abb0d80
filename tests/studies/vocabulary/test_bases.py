"""Merging into a `tokenizer.json` alone: of bytes; of characters as into SentencePiece's model."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, pre_tokenizers

from lightning_mixcn.studies.vocabulary.bases import (
    BYTES,
    FastBase,
    SentencePieceBase,
    as_bytes,
    is_character,
    is_partial,
)
from lightning_mixcn.studies.vocabulary.merge import choose_pieces, write_tokenizer
from lightning_mixcn.studies.vocabulary.scripts import ScriptFilter
from lightning_mixcn.studies.vocabulary.training import train_pieces
from lightning_mixcn.text import load_tokenizer
from lightning_mixcn.tokenizer.sentencepiece import read_pieces
from tests.extended_tokenizers import CYRILLIC, HAN, QWEN_ADDED, qwen_like, write_pieces
from tests.studies.vocabulary.vocab_data import small_base


def extend(folder: Path, out: Path, pieces: list[str], script: str = "Han") -> list[str]:
    base = FastBase(folder)
    chosen = choose_pieces(base, pieces, ScriptFilter(script))
    write_tokenizer(folder, base, chosen, script, out)
    return chosen.added


def test_it_equals_merging_into_sentencepiece(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    pieces = [*read_pieces(str(write_pieces(tmp_path / "zh.model", HAN, 90))), "中大"]
    one = SentencePieceBase(base)
    chosen = choose_pieces(one, pieces, ScriptFilter("Han"))
    write_tokenizer(base, one, chosen, "Han", tmp_path / "one")
    load_tokenizer(base).hf.save_pretrained(tmp_path / "fast")
    assert extend(tmp_path / "fast", tmp_path / "two", pieces) == chosen.added
    texts = ["中大中大", "今天天气 the 中国学生", "".join(HAN), "  模型 12"]
    ours, theirs = (load_tokenizer(tmp_path / name).encode_batch(texts) for name in ("two", "one"))
    assert ours == theirs
    assert len(ours[0]) == 3  # old pieces first: ▁中, 大, 中大


@pytest.mark.parametrize("use_regex", [True, False])
def test_pieces_of_bytes(tiny_base: Path, tmp_path: Path, use_regex: bool) -> None:
    """The base has single bytes only, so beginnings of characters are added; ids say what comes back."""
    content = json.loads((tiny_base / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["use_regex"] = use_regex
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (base / "tokenizer_config.json").write_bytes((tiny_base / "tokenizer_config.json").read_bytes())
    zh, ru = write_pieces(tmp_path / "zh.model", HAN, 90), write_pieces(tmp_path / "ru.model", CYRILLIC, 120, " ")
    extend(base, tmp_path / "zh", read_pieces(str(zh)))
    extend(tmp_path / "zh", tmp_path / "both", read_pieces(str(ru)), "Cyrillic")  # one on top of the other
    tokenizer = load_tokenizer(tmp_path / "both")
    texts = ["今天天气", "привет мир", "plain English, é and 𠮷\n"]
    zh_ids, ru_ids, other = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in (zh_ids, ru_ids, other)] == texts
    assert len(zh_ids) <= 2
    assert len(ru_ids) <= 5  # the first word has no blank in front, as no word of the corpus
    assert other == load_tokenizer(base).encode_batch(texts)[2]
    known: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "both")
    assert known(texts)["input_ids"] == [[1, *ids] for ids in (zh_ids, ru_ids, other)]  # BOS first, as the base


def test_pieces_beside_qwens_added_tokens(tmp_path: Path) -> None:
    """Its added tokens have ids after the model's pieces, where new pieces must not push them further."""
    base = qwen_like(tmp_path / "base")
    extend(base, tmp_path / "zh", read_pieces(str(write_pieces(tmp_path / "zh.model", HAN, 90))))
    ru = read_pieces(str(write_pieces(tmp_path / "ru.model", CYRILLIC, 120, " ")))
    extend(tmp_path / "zh", tmp_path / "both", ru, "Cyrillic")
    old, zh, both = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("base", "zh", "both"))
    assert old.get_vocab().items() < zh.get_vocab().items() < both.get_vocab().items()
    for backend in (zh, both):
        assert sorted(backend.get_vocab().values()) == list(range(backend.get_vocab_size()))
        assert backend.get_added_tokens_decoder().keys() == old.get_added_tokens_decoder().keys()
    kept = ["Once upon a time, it's Lily's 2024 café\u0301!\r\n\n  def f(x):\t return x", "<|im_start|>"]
    chat = "<|im_start|>user\nTom<|im_end|>\n<think>\n</think>"
    for text in [*kept, chat]:
        assert both.encode(text).ids == zh.encode(text).ids == old.encode(text).ids, text
    tokenizer = load_tokenizer(tmp_path / "both")
    news = ["今天天气", "привет мир", *kept]
    ids = tokenizer.encode_batch(news)
    assert len(ids[0]) <= 2
    assert len(ids[1]) <= 5
    assert not {index for row in ids for index in row} & set(range(300, 303))  # none is read out of a text
    known: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "both")
    assert known(news, split_special_tokens=True)["input_ids"] == ids
    assert known(chat)["input_ids"] == old.encode(chat).ids
    assert [known.convert_tokens_to_ids(token) for token in QWEN_ADDED] == list(range(300, 305))


def test_other_models_are_refused(tmp_path: Path) -> None:
    from tokenizers import models

    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"is a WordLevel. Pieces can be merged into a BPE only"):
        FastBase(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json .*Copy it again"):
        FastBase(tmp_path)


def test_scores_descend_below_the_old_ones(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    (tmp_path / "out").mkdir()
    SentencePieceBase(base).write(tmp_path / "out", ["甲", "甲乙"])
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    proto.ParseFromString((tmp_path / "out/tokenizer.model").read_bytes())
    ordinary = [piece.score for piece in proto.pieces[:-2] if piece.type == 1 and set(piece.piece) != {"▁"}]
    assert min(ordinary) > proto.pieces[-2].score > proto.pieces[-1].score
    assert proto.trainer_spec.vocab_size == len(proto.pieces) == 372


def test_a_unigram_base_is_refused(tmp_path: Path) -> None:
    lines = iter(["привет мир город книга"] * 10)
    model = train_pieces(
        lines, vocab_size=18, model_type="unigram", character_coverage=1.0, max_piece_characters=8, max_sentences=0,
        seed=0,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match=r"is no BPE model. Pieces can be merged into a BPE only"):
        SentencePieceBase(tmp_path)


def test_a_base_whose_files_differ_is_refused(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    tokenizer = load_tokenizer(base).hf
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match=r"tokenizer.json has other pieces than tokenizer.model. Remove one"):
        SentencePieceBase(base)


@given(text=st.text(st.characters(codec="utf-8")))
def test_text_is_spelled_as_the_library_spells_it(text: str) -> None:
    spelled = as_bytes(text)
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert spelled == "".join(part for part, _ in theirs)
    assert decoders.ByteLevel().decode([spelled]) == text
    assert not is_partial(spelled)
    assert is_character(spelled) == (len(text) == 1)


def test_every_byte_has_a_character() -> None:
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))
    assert [is_partial(piece) for piece in (as_bytes("中")[:2], as_bytes("中")[1:], "Ġa", "中")] == [
        True, True, False, False,
    ]  # fmt: skip
