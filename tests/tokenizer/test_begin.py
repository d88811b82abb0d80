"""BOS before a text: where the tokenizer itself puts it, by stock transformers."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from lightning_mixcn.testing.tiny import byte_tokenizer
from lightning_mixcn.text import TextTokenizer, load_tokenizer
from lightning_mixcn.tokenizer.begin import put_bos_first, take_out_bos
from lightning_mixcn.tokenizer.tokenizer import begins_with_bos
from tests.extended_tokenizers import qwen_like

TEXT = "Hello, 你好 world"


def bytes_folder(folder: Path, *, bos: bool, **settings: Any) -> Path:
    byte_tokenizer(begins_with_bos=bos).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def llama3_like(folder: Path) -> Path:
    """BOS comes after a rule about offsets."""
    bytes_folder(folder, bos=True)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), backend.post_processor])
    backend.save(str(folder / "tokenizer.json"))
    return folder


FOLDERS: dict[str, tuple[Callable[[Path], Path], bool]] = {
    "template": (lambda folder: bytes_folder(folder, bos=True), True),
    "no template": (lambda folder: bytes_folder(folder, bos=False), False),
    "template, the setting says no": (lambda folder: bytes_folder(folder, bos=True, add_bos_token=False), True),
    "no template, the setting says yes": (lambda folder: bytes_folder(folder, bos=False, add_bos_token=True), False),
    "Llama 3's": (llama3_like, True),
    "Qwen's": (qwen_like, False),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_where_stock_transformers_puts_it(name: str, tmp_path: Path) -> None:
    make, begins = FOLDERS[name]
    folder = make(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.begin_ids == ((tokenizer.bos_id,) if begins else ())
    assert begins_with_bos(folder) is begins
    (ids,) = tokenizer.encode_batch([TEXT])
    row = [*tokenizer.begin_ids, *ids]
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == row
    assert tokenizer.hf(TEXT).input_ids == row
    assert pickle.loads(pickle.dumps(tokenizer)).begin_ids == tokenizer.begin_ids
    tokenizer.hf.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").begin_ids == tokenizer.begin_ids


@pytest.mark.parametrize(("setting", "begins"), [(None, True), (True, True), (False, False)])
def test_a_lone_sentencepiece_model_goes_by_the_setting(
    setting: bool | None, begins: bool, small_folder: Path, tmp_path: Path
) -> None:
    """Llama's and Mistral's put BOS first unless they are told not to."""
    shutil.copy(small_folder / "tokenizer.model", tmp_path)
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if setting is None else {"add_bos_token": setting})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    (ids,) = tokenizer.encode_batch([TEXT])
    assert tokenizer.begin_ids == ((1,) if begins else ())
    assert begins_with_bos(tmp_path) is begins
    assert tokenizer.hf(TEXT).input_ids == [*tokenizer.begin_ids, *ids]


def test_runs_on_rows_without_bos_are_not_those_with_it(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """All rows began with BOS once: runs of that time go on only where they still do."""
    with_bos, without = (load_tokenizer(bytes_folder(tmp_path / str(bos), bos=bos)) for bos in (True, False))
    assert with_bos.fingerprint != without.fingerprint
    assert tokenizer.fingerprint == load_tokenizer(tokenizer.path).fingerprint


@pytest.mark.parametrize("make", [lambda folder: bytes_folder(folder, bos=True), llama3_like])
def test_bos_is_taken_out_and_other_rules_stay(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "tokenizer")
    before = AutoTokenizer.from_pretrained(folder)
    take_out_bos(folder / "tokenizer.json")
    after = AutoTokenizer.from_pretrained(folder)
    assert after(TEXT).input_ids == before(TEXT).input_ids[1:]
    assert after("a", "b").input_ids == before("a", "b", add_special_tokens=False).input_ids
    kept = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["post_processor"]
    assert ("processors" in kept) == (make is llama3_like)


def test_bos_is_put_first_in_pairs_too(tmp_path: Path) -> None:
    """As Llama's and Mistral's templates have it."""
    backend = byte_tokenizer().backend_tokenizer
    put_bos_first(backend, "<s>")
    a, b = (backend.token_to_id(letter) for letter in "ab")
    assert backend.encode("a", "b").ids == [1, a, 1, b]
    assert backend.encode("a", add_special_tokens=False).ids == [a]
