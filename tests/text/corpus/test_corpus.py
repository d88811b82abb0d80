import bz2
import gzip
import json
import logging
import lzma
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from lightning_mixcn.text import Corpus, Source, read_corpus
from tests.text.corpus.jsonl_files import write

TEXTS = [f"document {number} 文件" * (number % 7 + 1) for number in range(2000)] + ["a \ufeff mark", "nul \0"]


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


def test_empty_records_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path, ["a", "", " \n", "b", "\u3000", "c"])
    for _ in range(2):  # told again when the store is reused
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            corpus = read_corpus(source)
        assert sorted(texts_of(corpus)) == ["a", "b", "c"]
        assert (corpus.empty_records, corpus.bad_records) == (3, 0)
        assert caplog.messages == [
            "Source 'zh': 3 files read, 0 left out; 3 documents, 3 records without text left out, too"
        ]
    (tmp_path / "zh0.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"the 1 files have no document but 1 records without text"):
        read_corpus(Source("zh", f"{tmp_path}/zh0.jsonl"))


def random_texts(count: int) -> list[str]:
    return [f"{random.Random(number).getrandbits(4000):x}" for number in range(count)]


def write_as(file: Path, texts: list[str]) -> bytearray:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".zst": zstandard.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    if file.suffix == ".json":
        file.write_text(json.dumps(texts))
    elif file.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=300, write_page_checksum=True)
    elif file.suffix == ".arrow":
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    else:
        file.write_bytes(compress[file.suffix](lines))
    return bytearray(file.read_bytes())


UNREAD = r"The rest of the file was not read: ([\d,]+) of ([\d,]+) bytes, ([\d.]+) %\. The first: `"


@pytest.mark.parametrize("name", ["x.json", "x.jsonl.gz", "x.jsonl.bz2", "x.jsonl.xz", "x.parquet"])
def test_the_rest_of_a_damaged_file_is_told(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged file is one bad record, but it says how much of the file that is."""
    texts = random_texts(3000)
    data = write_as(tmp_path / name, texts)
    start = len(data) * 2 // 3
    data[start : start + 2000] = bytes(2000)
    (tmp_path / name).write_bytes(data)
    with caplog.at_level(logging.WARNING):
        corpus = read_corpus(Source("zh", f"{tmp_path}/{name}"), on_bad_record="skip")
    (message,) = caplog.messages
    ((unread, whole, percent),) = re.findall(UNREAD, message)
    assert int(whole.replace(",", "")) == len(data)
    share = int(unread.replace(",", "")) / len(data)
    assert float(percent) == pytest.approx(100 * share, rel=0.01)
    # Exact for an array; elsewhere, what was decompressed is handed on by the megabyte, of three.
    assert share == pytest.approx(1 - len(corpus) / len(texts), abs=0.001 if name == "x.json" else 0.3)
    assert share > 0.25


@pytest.mark.parametrize("name", ["x.json", "x.jsonl.gz", "x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz", "x.arrow"])
def test_a_file_that_is_cut_off_is_told(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_as(tmp_path / name, random_texts(3000))
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    with caplog.at_level(logging.WARNING):
        assert len(read_corpus(Source("zh", f"{tmp_path}/{name}"), on_bad_record="skip")) > 900
    (message,) = caplog.messages
    assert "The rest of the file was not read: " in message


def test_the_rest_of_an_array_is_told_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, rest = '["中文",\n"b",\n', '{"text"}, "c", "d"]'
    for name, data in {"x.json": (good + rest).encode(), "x.json.gz": gzip.compress((good + rest).encode())}.items():
        caplog.clear()
        (tmp_path / name).write_bytes(data)
        with caplog.at_level(logging.WARNING):
            assert texts_of(read_corpus(Source("zh", f"{tmp_path}/{name}"), on_bad_record="skip")) == ["中文", "b"]
        share = len(rest.encode()) / len((good + rest).encode())
        told = f"was not read: {round(share * len(data))} of {len(data)} bytes"
        assert told in caplog.messages[0]


def test_a_file_of_another_encoding_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, ["a"], files=1)
    (tmp_path / "zh1.jsonl").write_text('{"text": "b"}\n', encoding="utf-16")
    with caplog.at_level(logging.WARNING):
        assert len(read_corpus(Source("zh", f"{tmp_path}/*.jsonl"), on_bad_record="skip")) == 1
    size = (tmp_path / "zh1.jsonl").stat().st_size
    assert f"The rest of the file was not read: {size} of {size} bytes, 100 %. The first: `" in caplog.messages[0]
    assert "is UTF-16, as its byte order mark says" in caplog.messages[0]


def test_stores_of_older_versions_are_not_used(tmp_path: Path) -> None:
    """A version that kept byte order marks or empty texts would train on them for ever."""
    source = write(tmp_path, ["a"], files=1)
    store = read_corpus(source).stores[0]
    content = json.loads(Path(store.folder, "store.json").read_text())
    Path(store.folder, "store.json").write_text(json.dumps(content | {"version": 1}))
    Path(store.folder, "texts.bin").write_bytes(b"b")
    assert texts_of(read_corpus(source)) == ["a"]
