"""Text of tokens that come one by one, with tokenizers whose characters take several tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.testing.tiny import byte_tokenizer
from lightning_mixcn.text import TextTokenizer, load_tokenizer
from lightning_mixcn.tokenizer.tokenizer import stream_text


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TextTokenizer:
    if request.param == "sentencepiece":
        return tokenizer
    folder: Path = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


@given(st.text(st.sampled_from("你好世界😀é a\n.") | st.characters(codec="utf-8"), max_size=20))
def test_pieces_are_whole_characters_and_lose_nothing(any_tokenizer: TextTokenizer, text: str) -> None:
    if "▁" in text or "\N{REPLACEMENT CHARACTER}" in text:  # SentencePiece's blank comes back as a blank
        return
    (ids,) = any_tokenizer.encode_batch([text])
    pieces = list(stream_text(ids, any_tokenizer.decode))
    assert "".join(pieces) == text.lstrip()
    assert all(pieces)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_piece_comes_as_soon_as_it_is_whole(any_tokenizer: TextTokenizer) -> None:
    (ids,) = any_tokenizer.encode_batch(["a😀b"])
    taken: list[int] = []

    def tokens() -> Iterator[int]:
        for index in ids:
            taken.append(index)
            yield index

    seen = [(piece, any_tokenizer.decode(taken)) for piece in stream_text(tokens(), any_tokenizer.decode)]
    assert [piece for piece, _ in seen] == ["a", "😀", "b"]
    assert [so_far for _, so_far in seen] == ["a", "a😀", "a😀b"]


def test_bytes_that_stay_broken_are_shown_at_the_end(any_tokenizer: TextTokenizer) -> None:
    (ids,) = any_tokenizer.encode_batch(["a😀"])
    pieces = list(stream_text(ids[:-1], any_tokenizer.decode))
    assert pieces[0] == "a"
    assert set("".join(pieces[1:])) == {"\N{REPLACEMENT CHARACTER}"}


def test_special_tokens_and_nothing(any_tokenizer: TextTokenizer) -> None:
    assert list(stream_text([], any_tokenizer.decode)) == []
    assert list(stream_text([any_tokenizer.eos_id], any_tokenizer.decode)) == []
