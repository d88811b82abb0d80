"""The longest documents, as rows and shared out."""

import json
from pathlib import Path

import pytest

from lightning_mixcn.studies import longest_documents
from lightning_mixcn.text import (
    DocumentSet,
    Source,
    TextTokenizer,
    all_documents,
    load_tokenizer,
    read_corpus,
)


@pytest.fixture
def tokenizer(tiny_base: Path) -> TextTokenizer:
    return load_tokenizer(tiny_base)


@pytest.fixture
def sets(tmp_path: Path) -> list[DocumentSet]:
    texts = {"zh": ["中文" * 10, "短", "长一些的中文" * 10], "en": ["", "a" * 50, "b" * 30]}
    found = []
    for name, documents in texts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
        found.append(all_documents(read_corpus(Source(name, str(path)))))
    return found


def test_the_longest_of_each_source_come_first(sets: list[DocumentSet], tokenizer: TextTokenizer) -> None:
    rows = longest_documents(sets, tokenizer, documents=2, max_tokens=1000)
    assert [(row.source, len(row.ids)) for row in rows] == [(0, 181), (0, 61), (1, 51), (1, 31)]
    assert all(row.ids[0] == tokenizer.bos_id and row.byte_counts[0] == 0 for row in rows)
    assert tokenizer.decode(rows[0].ids[1:].tolist()) == "长一些的中文" * 10
    assert int(rows[0].byte_counts.sum()) == 180


def test_a_document_is_cut(sets: list[DocumentSet], tokenizer: TextTokenizer) -> None:
    rows = longest_documents(sets, tokenizer, documents=1, max_tokens=41)
    assert [(len(row.ids), len(row.byte_counts)) for row in rows] == [(41, 41), (41, 41)]


def test_ranks_have_each_document_once(sets: list[DocumentSet], tokenizer: TextTokenizer) -> None:
    def share(rank: int, num_ranks: int) -> list[list[int]]:
        rows = longest_documents(sets, tokenizer, documents=9, max_tokens=99, rank=rank, num_ranks=num_ranks)
        return [row.ids.tolist() for row in rows]

    whole = share(0, 1)
    assert len(whole) == 5  # the empty one has nothing to predict
    assert sorted(row for rank in range(4) for row in share(rank, 4)) == sorted(whole)
