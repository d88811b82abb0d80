import gzip
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.testing.tiny import byte_tokenizer
from lightning_mixcn.text import TextTokenizer, load_tokenizer
from lightning_mixcn.tokenizer.sentencepiece import PROBES
from lightning_mixcn.tokenizer.tokenizer import stream_text
from tests.extended_tokenizers import qwen_like

SPECIALS = "a<s>b</s> <unk> </s>"


@pytest.fixture
def folder(tokenizer: TextTokenizer, small_folder: Path, tmp_path: Path) -> Path:
    """Make a folder with both files, to be damaged."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(small_folder / name, tmp_path)
    tokenizer.hf.save_pretrained(tmp_path)
    return tmp_path


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def real_lines(shared: Path) -> list[str]:
    """Read a fixed few thousand lines and some whole documents, of every corpus."""
    texts: list[str] = []
    for file in sorted(shared.glob("corpora/*/*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for _, line in zip(range(40), lines, strict=False)]
        documents = [value for record in records for value in record.values()]
        texts += documents[:40]
        texts += [line for document in documents for line in document.split("\n")[:20]]
    return [text for text in texts if len(text) < 50_000]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-zh-48224"])
@pytest.mark.parametrize("kept", ["tokenizer.json", "tokenizer.model", "both"])
def test_real_text_equals_sentencepiece(name: str, kept: str, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tokenizers" / name
    files = ["tokenizer.json", "tokenizer.model"] if kept == "both" else [kept]
    for file in [*files, "tokenizer_config.json"]:
        shutil.copy(source / file, tmp_path)
    texts = real_lines(shared_data)
    assert len(texts) > 3000
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    expected = reference.encode(texts)
    assert sum(map(len, expected)) > 200_000
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.decode(ids) for ids in expected] == [text.replace("▁", " ") for text in texts]


@pytest.mark.parametrize("kept", ["tokenizer.json", "tokenizer.model"])
def test_either_file_gives_the_same(kept: str, folder: Path, tokenizer: TextTokenizer) -> None:
    (folder / {"tokenizer.json": "tokenizer.model", "tokenizer.model": "tokenizer.json"}[kept]).unlink()
    loaded = load_tokenizer(folder)
    assert loaded.encode_batch(PROBES) == tokenizer.encode_batch(PROBES)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (1, 2, 380)
    assert loaded.fingerprint == tokenizer.fingerprint


def test_tokenizer_class_does_not_matter(folder: Path, tokenizer: TextTokenizer) -> None:
    edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="LlamaTokenizer"))
    loaded = load_tokenizer(folder)
    assert loaded.encode_batch(PROBES) == tokenizer.encode_batch(PROBES)
    assert loaded.hf("  two", add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(["  two"])[0]


def test_literal_special_tokens_are_text(tokenizer: TextTokenizer) -> None:
    (ids,) = tokenizer.encode_batch([SPECIALS])
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == SPECIALS
    assert {1, 2} <= set(tokenizer.hf(SPECIALS)["input_ids"])  # so transformers does read them
    assert tokenizer.encode_batch([SPECIALS]) == [ids]  # and calling it has changed nothing here


def test_pickled_tokenizer_is_the_same(tokenizer: TextTokenizer) -> None:
    copy: TextTokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_batch([*PROBES, SPECIALS]) == tokenizer.encode_batch([*PROBES, SPECIALS])
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.path == tokenizer.path


@given(text=st.text(st.characters(codec="utf-8")))
def test_bytes_are_credited_once(text: str, tokenizer: TextTokenizer) -> None:
    ((ids, widths),) = tokenizer.encode_batch_with_bytes([text])
    assert ids.tolist() == tokenizer.encode_batch([text])[0]
    assert widths.sum() == len(text.encode())
    assert (widths >= 0).all()
    assert widths.shape == ids.shape


def test_bytes_belong_to_the_token_that_reaches_them(tokenizer: TextTokenizer) -> None:
    ((ids, widths),) = tokenizer.encode_batch_with_bytes(["the 的𠮷!"])
    pieces = [tokenizer.hf.convert_ids_to_tokens(int(index)) for index in ids]
    assert pieces == ["▁the", "▁的", "<0xF0>", "<0xA0>", "<0xAE>", "<0xB7>", "!"]
    assert widths.tolist() == [3, 4, 4, 0, 0, 0, 1]


def test_decode_can_show_special_tokens(tokenizer: TextTokenizer) -> None:
    ids = [1, *tokenizer.encode_batch(["the"])[0], 2]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> the</s>"


def test_bytes_of_tokens(tokenizer: TextTokenizer) -> None:
    (ids,) = tokenizer.encode_batch(["the 鑫"])  # not in the vocabulary: three tokens of one byte each
    assert tokenizer.num_bytes([1, *ids, 2]) == len("the 鑫".encode())
    assert tokenizer.num_bytes(ids[:-2]) == len("the ") + 1
    assert tokenizer.num_bytes(ids[-1:]) == 1


def test_special_tokens_map_and_chat_template_are_read(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokens = {"bos_token": {"content": "</s>"}, "eos_token": "<s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
    assert tokenizer.hf.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_contradicting_files_are_refused(folder: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        merges[0], merges[-1] = merges[-1], merges[0]

    edit(folder / "tokenizer.json", swap)
    with pytest.raises(ValueError, match=r"differs from SentencePiece's .* Remove the wrong one of the two"):
        load_tokenizer(folder)


def test_missing_bos_is_refused(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    edit(folder / "tokenizer_config.json", lambda config: config.pop("bos_token"))
    with pytest.raises(ValueError, match=r"has no `bos_token`. Set it in tokenizer_config.json"):
        load_tokenizer(folder)


def test_a_bos_of_null_is_eos(tmp_path: Path) -> None:
    """Qwen's and OLMoE's files state that there is none: EOS stands between documents."""
    tokenizer = load_tokenizer(qwen_like(tmp_path / "qwen"))
    assert tokenizer.bos_id == tokenizer.eos_id == 302
    assert tokenizer.encode_batch(["<|im_end|>"])[0] != [302]
    tokenizer.hf.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_eos_outside_the_vocabulary_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda config: config.update(eos_token="<end>"))
    with pytest.raises(ValueError, match=r"`eos_token='<end>'` .* is not in its vocabulary"):
        load_tokenizer(folder)


def test_special_token_that_text_can_forge_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"][1].update(special=False))
    with pytest.raises(ValueError, match=r"The text '<s>' becomes special token 1"):
        load_tokenizer(folder)


def test_missing_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"`tokenizer='no/such'` is not a folder"):
        load_tokenizer("no/such")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_json(name: str, folder: Path) -> None:
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name}[`'] is not .*ownload it again"):
        load_tokenizer(folder)


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
