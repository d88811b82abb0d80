import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest

from lightning_mixcn.text import Corpus, Source, read_corpus

TEXTS = [f"document {number} 文件" * (number % 7 + 1) for number in range(2000)] + ["\ufeff mark", "nul \0"]


def write(folder: Path, texts: list[str], name: str = "zh", files: int = 3) -> Source:
    for index in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[index::files])
        (folder / f"{name}{index}.jsonl").write_text("".join(lines))
    return Source(name, f"{folder}/{name}*.jsonl")


def texts_of(corpus: Corpus) -> list[str]:
    return [corpus.text(index) for index in range(len(corpus))]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return read_corpus(write(tmp_path, TEXTS))


def test_documents_bytes_and_origins(corpus: Corpus, tmp_path: Path) -> None:
    expected = TEXTS[0::3] + TEXTS[1::3] + TEXTS[2::3]
    assert texts_of(corpus) == expected
    assert [corpus.num_bytes_of(index) for index in range(len(corpus))] == [len(text.encode()) for text in expected]
    assert corpus.total_bytes == sum(len(text.encode()) for text in TEXTS)
    origin = corpus.origin(len(TEXTS[0::3]) + 4)
    assert (origin.source, origin.file, origin.record) == ("zh", tmp_path / "zh1.jsonl", 5)


def test_digests_are_those_of_the_texts(corpus: Corpus, tmp_path: Path) -> None:
    digests = np.concatenate([digests for _, digests in corpus.digest_blocks()])
    assert digests.dtype == np.uint64
    assert [corpus.digest(index) for index in range(len(corpus))] == digests.tolist()
    assert len(set(digests.tolist())) == len(set(TEXTS))
    # Which documents are held out depends on this number: with another one, what was trained on comes to be held out.
    assert digests[0] == 4353969119699024191
    for first, block in corpus.digest_blocks():
        assert corpus.digest(first) == block[0]
    reordered = read_corpus(write(tmp_path, TEXTS[::-1], name="other", files=1))
    assert {corpus.text(i): corpus.digest(i) for i in range(len(corpus))} == {
        reordered.text(i): reordered.digest(i) for i in range(len(corpus))
    }


def test_index_out_of_range(corpus: Corpus) -> None:
    for index in (-1, len(TEXTS)):
        with pytest.raises(IndexError, match=rf"`index={index}`: source 'zh' has 2002 documents, counted from 0"):
            corpus.text(index)


def test_pickled_corpus_is_the_same_and_small(corpus: Corpus) -> None:
    texts_of(corpus)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 2000
    copy: Corpus = pickle.loads(pickled)
    assert copy == corpus
    assert texts_of(copy) == texts_of(corpus)


def test_fingerprint_sees_any_change(tmp_path: Path) -> None:
    seen = set()
    for texts in (TEXTS[:9], TEXTS[:8], TEXTS[8::-1], [*TEXTS[:8], "x"]):
        seen.add(read_corpus(write(tmp_path, texts, files=1)).fingerprint)
        assert read_corpus(write(tmp_path, texts, files=1)).fingerprint in seen
    assert len(seen) == 4


def test_no_document(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"`sources\[0\].path=.*: the 1 files have no document. Give files"):
        read_corpus(Source("zh", f"{tmp_path}/x.jsonl"))
    (tmp_path / "x.jsonl").write_text('\n{"body": "a"}\n')
    with pytest.raises(ValueError, match=r"no document but 1 bad records, the first: .*x.jsonl` line 2 has no key"):
        read_corpus(Source("zh", f"{tmp_path}/x.jsonl"), on_bad_record="skip")


def test_bad_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path, TEXTS[:30])
    with (tmp_path / "zh1.jsonl").open("a") as file:
        file.write('{"text": 1}\n{"text": "after"}\n{"text"\n')
    for _ in range(2):
        with pytest.raises(ValueError, match=r"zh1.jsonl` line 11: expected a string under `text_key` 'text', got int"):
            read_corpus(source)
    for _ in range(2):  # told again when the store is reused
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            corpus = read_corpus(source, on_bad_record="skip")
        assert (len(corpus), corpus.bad_records) == (31, 2)
        (message,) = caplog.messages
        assert f"`{tmp_path}/zh1.jsonl`: 2 bad records were left out, 11 documents are kept." in message
        assert "line 11: expected a string" in message


def test_unknown_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`on_bad_record='mend'`: expected one of error, skip"):
        read_corpus(write(tmp_path, TEXTS[:3]), on_bad_record="mend")  # type: ignore[arg-type]  # as from a YAML


def test_urls(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    local = read_corpus(write(tmp_path, TEXTS))
    for path in sorted(tmp_path.glob("*.jsonl")):
        memory.pipe(f"/corpus/{path.name}", path.read_bytes())
    for url in ("memory://corpus/*.jsonl", "memory://corpus", "memory://corpus/"):
        corpus = read_corpus(Source("zh", url))
        assert texts_of(corpus) == texts_of(local)
        assert corpus.fingerprint == local.fingerprint
        assert corpus.origin(0).file == "memory://corpus/zh0.jsonl"
    memory.pipe("/corpus/zh0.jsonl", b'{"text": "changed"}\n')
    assert read_corpus(Source("zh", "memory://corpus")).text(0) == "changed"
    assert read_corpus(Source("zh", f"file://{tmp_path}/*.jsonl")).fingerprint == local.fingerprint
