import json
import random
from pathlib import Path

import pytest

from lightning_mixcn.text import Corpus, Source, read_corpus
from lightning_mixcn.text.corpus.corpus import DocumentSet, all_documents, split_by_hash

TEXTS = [f"document {number} 文件" * (number % 7 + 1) for number in range(2000)]


def write(folder: Path, texts: list[str], name: str = "zh", files: int = 3) -> Source:
    for index in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[index::files])
        (folder / f"{name}{index}.jsonl").write_text("".join(lines))
    return Source(name, f"{folder}/{name}*.jsonl")


def texts_of(documents: DocumentSet) -> list[str]:
    return [documents.text(index) for index in range(len(documents))]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return read_corpus(write(tmp_path, TEXTS))


def test_all_documents(corpus: Corpus, tmp_path: Path) -> None:
    documents = all_documents(corpus)
    assert texts_of(documents) == TEXTS[0::3] + TEXTS[1::3] + TEXTS[2::3]
    assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)
    origin = documents.origin(len(TEXTS[0::3]) + 4)
    assert (origin.source, origin.file, origin.record) == ("zh", tmp_path / "zh1.jsonl", 5)


def test_split_is_complete_and_disjoint(corpus: Corpus) -> None:
    held_out, training = split_by_hash(corpus, [0.1, 0.05])
    indices = [index for part in held_out for index in part.indices]
    rest = [index for index in range(len(corpus)) if index in training]
    assert sorted([*indices, *rest]) == list(range(len(TEXTS)))
    assert (len(rest), len(indices)) == (len(training), len(training.held_out))
    assert [len(part) for part in held_out] == [pytest.approx(200, abs=50), pytest.approx(100, abs=40)]
    sizes = [part.num_bytes for part in held_out]
    assert sizes == [sum(len(text.encode()) for text in texts_of(part)) for part in held_out]
    assert sum(sizes) + training.num_bytes == corpus.total_bytes


def test_split_depends_on_the_texts_alone(corpus: Corpus, tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    other = read_corpus(write(tmp_path, shuffled, name="other", files=1))
    ours, theirs = split_by_hash(corpus, [0.1])[0], split_by_hash(other, [0.1])[0]
    assert [texts_of(part) for part in ours] == [texts_of(part) for part in theirs]


def test_equal_texts_come_to_one_side(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path, TEXTS[:300] + TEXTS[:150]))
    (held_out,), training = split_by_hash(corpus, [0.3])
    rest = {corpus.text(index) for index in range(len(corpus)) if index in training}
    assert not set(texts_of(held_out)) & rest
    assert len(held_out) + len(training) == 450


def test_nothing_held_out(corpus: Corpus) -> None:
    held_out, training = split_by_hash(corpus, [])
    assert (held_out, len(training)) == ([], len(corpus))
    assert all(index in training for index in range(len(corpus)))


def test_fingerprint_sees_any_change(tmp_path: Path) -> None:
    seen = set()
    for texts in (TEXTS[:9], TEXTS[:8], TEXTS[8::-1], [*TEXTS[:8], "x"]):
        for fractions in ([], [0.1]):
            seen.add(split_by_hash(read_corpus(write(tmp_path, texts, files=1)), fractions)[1].fingerprint)
    assert len(seen) == 8
