"""Tokenizers that SentencePiece itself trained on a few words, and where the real ones are."""

import io
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lightning_mixcn.text import (
    Corpus,
    DocumentSet,
    Source,
    TextTokenizer,
    TrainingDocuments,
    all_documents,
    load_tokenizer,
    read_corpus,
    split_by_hash,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WORDS = """the of and to in a is that for it 的 一 是 不 了 在 人 有 我 他 这 中 大
    return def self == 12 345 ,。 !"""

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Makes a folder with `tokenizer.model` (by default as Mixtral's is made, but small) and its configuration."""

    def train(**options: Any) -> Path:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        draw = random.Random(1)
        lines = [" ".join(draw.choices(WORDS.split(), k=8)) for _ in range(400)] + ["    x  y   z"] * 20
        settings: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": 380,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
        }
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, **(settings | options)
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return folder

    return train


@pytest.fixture(scope="session")
def small_folder(train_sentencepiece: Train) -> Path:
    return train_sentencepiece()


@pytest.fixture(scope="session")
def tokenizer(small_folder: Path) -> TextTokenizer:
    return load_tokenizer(small_folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real tokenizers and corpora lie outside the project and are not here")
    return SHARED


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Corpus]:
    """Makes the corpus of some texts."""
    folder, numbers = tmp_path_factory.mktemp("documents"), itertools.count()

    def make(texts: list[str], name: str = "zh", **fields: Any) -> Corpus:
        file = folder / f"{next(numbers)}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return read_corpus(Source(name, str(file), **fields))

    return make


@pytest.fixture(scope="session")
def documents(corpus: Callable[..., Corpus]) -> Callable[..., DocumentSet]:
    """Makes the set of some texts, to evaluate."""
    return lambda texts, **fields: all_documents(corpus(texts, **fields))


@pytest.fixture(scope="session")
def training(corpus: Callable[..., Corpus]) -> Callable[..., TrainingDocuments]:
    """Makes the training documents of some texts; nothing is held out."""
    return lambda texts, **fields: split_by_hash(corpus(texts, **fields), [])[1]
