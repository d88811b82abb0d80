"""Corpora and sets of a few documents."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from lightning_mixcn.text import (
    Corpus,
    DocumentSet,
    Source,
    TrainingDocuments,
    all_documents,
    read_corpus,
    split_by_hash,
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Corpus]:
    """Make the corpus of some texts."""
    folder, numbers = tmp_path_factory.mktemp("documents"), itertools.count()

    def make(texts: list[str], name: str = "zh", **fields: Any) -> Corpus:
        file = folder / f"{next(numbers)}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return read_corpus(Source(name, str(file), **fields))

    return make


@pytest.fixture(scope="session")
def documents(corpus: Callable[..., Corpus]) -> Callable[..., DocumentSet]:
    """Make the set of some texts, to evaluate."""
    return lambda texts, **fields: all_documents(corpus(texts, **fields))


@pytest.fixture(scope="session")
def training(corpus: Callable[..., Corpus]) -> Callable[..., TrainingDocuments]:
    """Make the training documents of some texts; nothing is held out."""
    return lambda texts, **fields: split_by_hash(corpus(texts, **fields), [])[1]
