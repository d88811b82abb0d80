"""Every form of a questions file, and what is refused."""

import json
from pathlib import Path

import pytest

from lightning_mixcn.studies.preference.questions import read_questions, shown
from lightning_mixcn.text import Turn


def test_text_is_a_question_a_line(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("\ufeff你好？\n\n  What is 1+1?  \r\n", encoding="utf-8")
    assert read_questions(str(tmp_path / "q.txt")) == [[Turn("user", "你好？")], [Turn("user", "What is 1+1?")]]


RECORDS = [
    ({"question": "a?"}, [("user", "a?")]),
    ({"question": "a?", "system": "Be short."}, [("system", "Be short."), ("user", "a?")]),
    ({"question": "a?", "system": None}, [("user", "a?")]),
    ({"messages": [{"role": "user", "content": "a?"}]}, [("user", "a?")]),
    (
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        [("user", "a"), ("assistant", "b"), ("user", "c")],
    ),
    ({"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]}, [("user", "a")]),
    ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [("user", "Add.\n1, 2")]),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [("user", "a")]),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_records(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"q{suffix}"
    records = [record for record, _ in RECORDS]
    content = json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records))
    file.write_text(content, encoding="utf-8")
    found = [[(turn.role, turn.content) for turn in turns] for turns in read_questions(str(file))]
    assert found == [expected for _, expected in RECORDS]


def test_a_judge_reads_what_was_said_before() -> None:
    assert shown([Turn("user", "a?")]) == "a?"
    assert shown([Turn("system", "s"), Turn("user", "a?")]) == "[system] s\n\n[user] a?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", " \n", "has no question"),
        ("q.txt", b"\xff\xfe", "is not UTF-8"),
        ("q.jsonl", '{"question": "a"}\n{', "line 2 is not JSON"),
        ("q.jsonl", '{"question": "a"}\n\n{"question": " "}', "line 3: the question is empty"),
        ("q.jsonl", '{"question": "\\ud800"}', "line 1: 'utf-8' codec"),
        ("q.jsonl", '{"question": 3}', "line 1: `question` and `system` are to be text"),
        ("q.jsonl", '["a"]', "line 1: got a list"),
        ("q.jsonl", '{"messages": [3]}', "line 1: "),
        ("q.jsonl", '{"text": "a"}', "line 1: expected `messages`"),
        ("q.json", '{"question": "a"}', "holds no array"),
        ("q.json", "[", "is not JSON"),
        ("q.json", '[{"messages": [{"role": "robot", "content": "a"}, {"role": "user", "content": "b"}]}]', "'robot'"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="`questions=") as error:
        read_questions(str(file))
    assert message in str(error.value)


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_questions("nowhere.txt")
