"""Letters, scripts, shingles, signatures and runs of words, beside plain Python."""

import importlib.util
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from lightning_mixcn.studies.hygiene import signatures as under_test
from lightning_mixcn.studies.hygiene.characters import (
    SCRIPT_NAMES,
    count_scripts,
    line_hashes,
    shingles,
    take_apart,
    token_hashes,
)
from lightning_mixcn.studies.hygiene.contamination import Overlap, QuestionIndex
from lightning_mixcn.studies.hygiene.signatures import SignatureFile, changed_of, jaccard_of, signatures

MIXED = "Ｈｅｌｌｏ, Straße 12! 模型（Model）训练。\nこれは日本語です\n한국어 мир\n\n😀\U000f0000 สวัสดี"


def letters(text: str) -> str:
    return "".join(map(chr, take_apart(text).letters))


def test_letters_are_folded_and_all_else_is_left_out() -> None:
    expected = "".join(
        folded if len(folded := unicodedata.normalize("NFKC", c).casefold()) == 1 else c
        for c in MIXED
        if unicodedata.category(c)[0] in "LNM"
    )
    assert letters(MIXED) == expected
    assert letters("Ａ、B-c。") == letters("a b(C)") == "abc"


def test_scripts_of_letters_and_lines() -> None:
    in_letters, in_lines, digits = count_scripts(take_apart(MIXED))
    found = {name: int(count) for name, count in zip(SCRIPT_NAMES, in_letters, strict=True) if count}
    assert found == {"Han": 7, "Kana": 5, "Hangul": 3, "Latin": 16, "Cyrillic": 3, "Thai": 4}
    assert digits == 2
    lines = {name: int(count) for name, count in zip(SCRIPT_NAMES, in_lines, strict=True) if count}
    assert lines == {"Latin": 1, "Kana": 1, "Hangul": 1, "Thai": 1}


@pytest.mark.parametrize(("text", "size"), [("模型训练模型训练数据", 4), ("abcabcabcabd", 6), ("abc", 6), ("", 6)])
def test_shingles_are_equal_where_the_letters_are(text: str, size: int) -> None:
    apart = take_apart(text)
    plain = [text[place : place + size] for place in range(len(text) - size + 1)]
    assert len(np.unique(shingles(apart, apart.is_dense))) == len(set(plain))
    assert len(shingles(apart, apart.is_dense)) == len(plain)


def test_words() -> None:
    once, again = token_hashes(take_apart("The cat, 模型 x2")), token_hashes(take_apart("模the Cat型. X2"))
    assert len(once) == len(again) == 5
    assert once[[2, 0, 1, 3, 4]].tolist() == again.tolist()
    assert len(token_hashes(take_apart(" ?!"))) == len(line_hashes(take_apart(" ?!"))) == 0


def test_lines_and_the_whole() -> None:
    first, second, whole = line_hashes(take_apart("Ab c\n\n!\nd")).tolist()
    assert [first, second] == [line_hashes(take_apart(line))[0] for line in ("abc", "D")]
    assert whole == line_hashes(take_apart("abcd"))[-1]


@pytest.mark.parametrize("size", [4, 6])
def test_the_share_changed_and_the_jaccard_index(size: int) -> None:
    random.seed(size)
    text = [random.random() for _ in range(20_000)]
    changed = [random.random() if random.random() < 0.1 else value for value in text]
    one, other = ({tuple(each[at : at + size]) for at in range(len(each) - size)} for each in (text, changed))
    index = len(one & other) / len(one | other)
    assert changed_of(index, size) == pytest.approx(0.1, abs=0.01)
    assert jaccard_of(changed_of(index, size), size) == pytest.approx(index)


def test_a_question_in_a_text() -> None:
    question = "What is the sum of all the whole numbers from one to one hundred, both included?"
    index = QuestionIndex([question, "中国的首都是哪一座城市？", "1+1=?", "Another question " + "of many words " * 6])
    assert index.ignored == 1

    def overlaps(text: str) -> list[Overlap]:
        apart = take_apart(text)
        return index.overlaps(token_hashes(apart), line_hashes(apart))

    assert overlaps(f"Before. {question.upper()} And after.") == [Overlap(0, 1.0)]
    # 14 of the 16 words.
    assert overlaps(f"Here {question.rsplit(' ', 2)[0]} excluded") == [Overlap(0, 14 / 16)]
    assert overlaps(" ".join(question.split()[:12])) == []
    assert overlaps("序言\n中国的首都,是哪一座城市\n北京") == [Overlap(1, 1.0)]
    assert overlaps("我问中国的首都是哪一座城市，他不答。") == []
    assert overlaps("") == []


def test_bands_pair_what_is_equal(tmp_path: Path) -> None:
    file = SignatureFile(tmp_path / "signatures.bin", 60)
    values = np.random.default_rng(0).integers(0, 2**16, (under_test.BANDS, 60, under_test.ROWS), dtype=np.uint16)
    values[7, 5] = values[7, 33]
    values[11, 10:60] = values[11, 10]  # more than are compared with each other
    file.write(0, values[:, :20])
    file.write(20, values[:, 20:])
    assert (file.band(11) == values[11]).all()
    pairs = np.concatenate(list(file.candidates(np.arange(60), np.zeros(60, bool))))
    found = set(map(tuple, pairs.tolist()))
    assert (5, 33) in found
    assert {(first, 59) for first in (10, 11, 58)} <= found
    assert all(first < second for first, second in found)
    assert (9, 10) not in found
    apart = np.concatenate(list(file.candidates(np.arange(60), np.arange(60) == 33)))
    assert (5, 33) not in set(map(tuple, apart.tolist()))
    assert file.agreement(np.array([[5, 33]])) == pytest.approx(3 / 510, abs=2 / 510)


@pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="needs the extra `data`")
def test_signatures_agree_as_often_as_sets_do() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**63, 1500).astype(np.uint64)
    found = signatures([numbers[:1000], numbers[500:], numbers[:1000]])
    assert (found[:, 0] == found[:, 2]).all()
    # 500 of 1,500 are in both; four standard deviations of 510 draws.
    assert (found[:, 0] == found[:, 1]).mean() == pytest.approx(1 / 3, abs=0.084)
