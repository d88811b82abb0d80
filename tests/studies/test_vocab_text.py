"""Text as it is read for a vocabulary: nothing lost, nothing too long, nothing copied."""

import gzip
import json
from pathlib import Path

import pytest

from lightning_mixcn.studies.vocabulary.training import (
    MAX_SENTENCE_CHARACTERS,
    corpus_files,
    iterate_texts,
    named_files,
    sentences,
)


def test_sentences_keep_all_but_blanks() -> None:
    long = "今天天气很好。" * 400 + "没有句号" * 600
    texts = ["  one\n\n two \r\nthree", long, "word " * 900]
    cut = list(sentences(iter(texts)))
    assert cut[:3] == ["one", "two", "three"]
    assert "".join(cut).replace(" ", "") == "".join("".join(texts).split())
    assert max(map(len, cut)) <= MAX_SENTENCE_CHARACTERS
    of_long = [part for part in cut if "今" in part]
    assert all(part.endswith("。") for part in of_long[:-1])
    assert all(not part.startswith("ord") for part in cut[3:])


def test_files_of_every_kind_without_a_copy(
    tmp_path: Path, cache_of_the_tests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(cache_of_the_tests.rglob("*"))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"content": "中文"}) + "\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "c.md").touch()
    files = corpus_files([str(tmp_path)], "content")
    (message,) = caplog.messages
    assert message.startswith("Source 'corpus': 2 files read, 1 left out: 1 with another suffix (`")
    assert list(iterate_texts(files, "reading")) == ["中文", "one", "two"]
    named = named_files([f"x={tmp_path / 'b.txt'}"], "text", "file")
    assert list(iterate_texts(named["x"], "x")) == ["one\ntwo\n"]
    assert sorted(cache_of_the_tests.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (["zh"], ValueError, "expected name=PATH"),
        (["zh=nowhere.jsonl"], FileNotFoundError, r"text\[0\].path='nowhere.jsonl'` matches no file"),
        (["zh=a.bin"], ValueError, "format of .* cannot be told"),
    ],
)
def test_bad_sources_are_refused(
    text: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.bin").write_bytes(b"x")
    with pytest.raises(error, match=message):
        named_files(text, "text", "file")
