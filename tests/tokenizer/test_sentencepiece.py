import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.text import TextTokenizer
from lightning_mixcn.tokenizer.sentencepiece import (
    PROBES,
    build_fast_tokenizer,
    check_against_sentencepiece,
    special_pieces,
)

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def reference(small_folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(small_folder / "tokenizer.model"))


def test_probes_equal_sentencepiece(tokenizer: TextTokenizer, reference: sentencepiece.SentencePieceProcessor) -> None:
    assert tokenizer.encode_batch(PROBES) == reference.encode(list(PROBES))


@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from(" \n的一是thea12=")))
def test_any_text_equals_sentencepiece(
    text: str, tokenizer: TextTokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    assert tokenizer.encode_batch([text]) == [reference.encode(text)]


def test_without_dummy_prefix(train_sentencepiece: Train) -> None:
    file = train_sentencepiece(add_dummy_prefix=False) / "tokenizer.model"
    fast = build_fast_tokenizer(file)
    fast.encode_special_tokens = True
    check_against_sentencepiece(
        lambda texts: [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)], file, ""
    )
    assert fast.decode(fast.encode("the of", add_special_tokens=False).ids) == "the of"


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-zh-48224"])
def test_merges_are_those_of_the_published_file(name: str, shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / name
    built = json.loads(build_fast_tokenizer(folder / "tokenizer.model").to_str())
    published = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert built["model"]["merges"] == published["model"]["merges"]
    assert built["model"]["vocab"] == published["model"]["vocab"]
    assert built["normalizer"] == published["normalizer"]
    assert built["decoder"] == published["decoder"]


def test_special_pieces(small_folder: Path) -> None:
    expected = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert special_pieces(small_folder / "tokenizer.model") == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 320}, "it is not a BPE model"),
        ({"byte_fallback": False, "vocab_size": 110}, "it has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"remove_extra_whitespaces": True}, "it normalises text"),
        ({"treat_whitespace_as_suffix": True}, "it marks blanks as suffixes"),
        ({"user_defined_symbols": ["<mask>"]}, "it has user-defined or unused pieces"),
    ],
)
def test_what_would_be_encoded_otherwise_is_refused(
    options: dict[str, object], reason: str, train_sentencepiece: Train
) -> None:
    with pytest.raises(ValueError, match=f"cannot be turned into a fast tokenizer: {reason}. Put a tokenizer.json"):
        build_fast_tokenizer(train_sentencepiece(**options) / "tokenizer.model")


def test_equal_scores_are_refused(shared_data: Path) -> None:
    with pytest.raises(ValueError, match=r"the same score 0\.0: the order of their merges depends"):
        build_fast_tokenizer(shared_data / "tokenizers" / "chinese-llama-2" / "tokenizer.model")


def test_a_difference_is_shown(tokenizer: TextTokenizer, small_folder: Path) -> None:
    def wrong(texts: list[str]) -> list[list[int]]:
        return [
            ids[1:] if text == " leading" else ids
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
        ]

    with pytest.raises(ValueError, match=r"differs from SentencePiece's tokenizer.model on ' leading': .* Do this."):
        check_against_sentencepiece(wrong, small_folder / "tokenizer.model", "Do this.")


@pytest.mark.parametrize("content", [b"", b"no model" * 50], ids=["empty", "other"])
def test_not_a_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        build_fast_tokenizer(tmp_path / "tokenizer.model")
