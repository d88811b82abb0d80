import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from lightning_mixcn.text import Corpus, Source, all_documents, read_corpus, split_by_hash

TEXTS = [f"document {number} 文件" * (number % 7 + 1) for number in range(2000)]


def write(folder: Path, texts: list[str], name: str = "zh", files: int = 3) -> Source:
    for index in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[index::files])
        (folder / f"{name}{index}.jsonl").write_text("".join(lines))
    return Source(name, f"{folder}/{name}*.jsonl")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return read_corpus(write(tmp_path, TEXTS))


def test_documents_bytes_and_origins(corpus: Corpus, tmp_path: Path) -> None:
    documents = all_documents(corpus)
    expected = TEXTS[0::3] + TEXTS[1::3] + TEXTS[2::3]
    assert [documents.text(index) for index in range(len(documents))] == expected
    assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)
    origin = documents.origin(len(TEXTS[0::3]) + 4)
    assert (origin.source, origin.file, origin.record) == ("zh", tmp_path / "zh1.jsonl", 5)


def test_pickled_corpus_is_the_same(corpus: Corpus) -> None:
    copy: Corpus = pickle.loads(pickle.dumps(corpus))
    assert copy.texts.equals(corpus.texts)
    assert all_documents(copy).fingerprint == all_documents(corpus).fingerprint


def test_split_is_complete_and_disjoint(corpus: Corpus) -> None:
    parts = split_by_hash(corpus, [0.1, 0.05])
    indices = np.concatenate([part.indices for part in parts])
    assert sorted(indices) == list(range(len(TEXTS)))
    assert len(parts[0]) == pytest.approx(200, abs=50)
    assert len(parts[1]) == pytest.approx(100, abs=40)


def test_split_depends_on_the_texts_alone(corpus: Corpus, tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    other = read_corpus(write(tmp_path, shuffled, name="other", files=1))
    for ours, theirs in zip(split_by_hash(corpus, [0.1])[:1], split_by_hash(other, [0.1])[:1], strict=True):
        assert [ours.text(i) for i in range(len(ours))] == [theirs.text(i) for i in range(len(theirs))]


def test_equal_texts_come_to_one_side(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path, TEXTS[:300] + TEXTS[:150]))
    held_out, rest = split_by_hash(corpus, [0.3])
    assert not {held_out.text(i) for i in range(len(held_out))} & {rest.text(i) for i in range(len(rest))}
    assert len(held_out) + len(rest) == 450


def test_fingerprint_sees_any_change(tmp_path: Path) -> None:
    seen = set()
    for texts in (TEXTS[:9], TEXTS[:8], TEXTS[8::-1], [*TEXTS[:8], "x"]):
        seen.add(all_documents(read_corpus(write(tmp_path, texts, files=1))).fingerprint)
    assert len(seen) == 4


def test_no_document(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"`sources\[0\].path=.*: the 1 files have no document"):
        read_corpus(Source("zh", f"{tmp_path}/x.jsonl"))
