import json
from pathlib import Path

import pytest

from lightning_mixcn.demo import text
from lightning_mixcn.demo.text import RUN_TOKENS


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
