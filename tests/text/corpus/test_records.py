import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_mixcn.text import (
    ConversationSource,
    Turn,
    load_conversation,
    parse_sources,
    read_corpus,
)
from lightning_mixcn.text.chat.turns import Role

RECORDS = [
    {
        "instruction": f"问题 {number}",
        "input": "",
        "output": f"回答\n{number}",
        "history": [["早", "好"]] * (number % 2),
    }
    for number in range(70)
]


def conversations(path: Path, **settings: Any) -> list[list[tuple[str, str]]]:
    corpus = read_corpus(ConversationSource("zh", str(path), **settings))
    read = [load_conversation(corpus.text(index)) for index in range(len(corpus))]
    return [[(turn.role, turn.content) for turn in turns] for turns in read]


def lines(records: list[dict[str, Any]]) -> str:
    return "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=30)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(records).encode()))
    else:
        path.write_text(lines(records) if path.suffix == ".jsonl" else json.dumps(records, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz", "x.parquet", "x.arrow"])
def test_every_format_gives_the_same(tmp_path: Path, name: str) -> None:
    found = conversations(write(tmp_path / name, RECORDS))
    assert len(found) == len(RECORDS)
    assert found[0] == [("user", "问题 0"), ("assistant", "回答\n0")]
    assert found[1] == [("user", "早"), ("assistant", "好"), ("user", "问题 1"), ("assistant", "回答\n1")]


def test_forms_may_be_mixed_in_a_file(tmp_path: Path) -> None:
    shared = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    found = conversations(write(tmp_path / "x.json", [RECORDS[0], shared]))
    assert found[1] == [("user", "问"), ("assistant", "答")]


def test_an_empty_array_has_no_document(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have no document"):
        conversations(write(tmp_path / "x.json", []))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '\n {"instruction": "a", "output": "b"}',
            "x.json` is a JSON object: expected an array of records. Set the source's `format: jsonl`, or give a glob "
            "that leaves it out",
        ),
        ('"a"', "x.json` is no JSON array: expected an array of records, got '\"a\"'. Mend the file"),
        ('[{"instruction": "a"', "x.json` is not JSON: Expecting"),
        ('[{"instruction": "a", "output": "b"}] 3', "expected nothing after the array, got '3'"),
        ('[{"instruction": "a", "output": "b"} 3]', "expected a comma or the array's end after the record of line 1"),
        ('[{"instruction": "a", "output": "b"},\n\n3]', "x.json` line 3: expected an object, got a int"),
        (
            '[\n{"question": "a"}]',
            "x.json` line 2: expected `messages`, `conversations`, or `instruction` and `output`",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        conversations(tmp_path / "x.json")


def test_bad_records_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n{"question": 1}\nnot JSON\n' + json.dumps(RECORDS[1]))
    corpus = read_corpus(ConversationSource("zh", str(path)), on_bad_record="skip")
    assert (len(corpus), corpus.bad_records) == (2, 2)
    with pytest.raises(ValueError, match=r"x\.jsonl` line 2: expected `messages`"):
        read_corpus(ConversationSource("zh", str(path)))


def test_the_stated_form_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", RECORDS[:2])
    with pytest.raises(ValueError, match="no key 'conversations', which sharegpt records have"):
        conversations(path, records="sharegpt")
    assert conversations(path, records="alpaca") == conversations(path)


def test_other_columns_of_a_table_are_not_read(tmp_path: Path) -> None:
    records = [record | {"score": 1.5, "thumbnail": b"\xff"} for record in RECORDS]
    assert len(conversations(write(tmp_path / "x.parquet", records))) == len(RECORDS)


TOLD_ROLES: tuple[dict[str, Role], ...] = ({"用户": "user"}, {"用户": "user"}, {"用户": "user", "tool": "user"})


def test_roles_are_the_sources_and_part_of_what_is_cached(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    turns = [
        {"role": "用户", "content": "问"},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "答"},
    ]
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(ValueError, match=r"x\.jsonl` line 1: `messages\[0\]\.role='用户'`: expected one of human"):
        conversations(path)
    turns.pop(1)
    path.write_text(json.dumps({"messages": turns}))
    assert conversations(path, roles={"用户": "user"}) == [[("user", "问"), ("assistant", "答")]]
    stores = [
        read_corpus(ConversationSource("zh", str(path), roles=roles), on_bad_record="skip").stores[0].folder
        for roles in TOLD_ROLES
    ]
    assert stores[0] == stores[1] != stores[2]
    with pytest.raises(ValueError, match="the assistant speaks first"):
        conversations(path, roles={"用户": "assistant"})


@pytest.mark.parametrize("roles", [{"tool": "tool"}, {"tool": None}, {1: "user"}, ["tool"], "user"])
def test_a_role_means_user_assistant_or_system(roles: Any) -> None:
    with pytest.raises(ValueError, match=r"`sources\[0\]\.roles.*=.*: expected (null or a mapping|one of system|text)"):
        parse_sources([{"name": "zh", "path": "x", "roles": roles}], "sources", ConversationSource)


def test_a_byte_order_mark_is_no_record(tmp_path: Path) -> None:
    for name in ("x.json", "x.jsonl", "x.jsonl.gz"):
        path = write(tmp_path / name, RECORDS)
        data = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
        expected = conversations(path)
        marked = b"\xef\xbb\xbf" + data
        path.write_bytes(gzip.compress(marked) if name.endswith("gz") else marked)
        assert conversations(path) == expected


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet", "x.arrow"])
def test_empty_answers_are_counted_and_left_out(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = ["a", "", " \n", "\u3000", "b"]
    path = write(tmp_path / name, [{"instruction": "q", "input": "", "output": answer} for answer in answers])
    with caplog.at_level(logging.INFO):
        corpus = read_corpus(ConversationSource("zh", str(path)))
    assert (len(corpus), corpus.empty_records, corpus.bad_records) == (2, 3, 0)
    assert caplog.messages == [
        "Source 'zh': 1 files read, 0 left out; 2 documents, 3 records without text left out, too"
    ]


def test_an_empty_answer_among_others(tmp_path: Path) -> None:
    """Its exchanges belong together: without the answer, the next question has lost its ground."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "qaq ", strict=True)]
    (tmp_path / "x.json").write_text(json.dumps([{"messages": turns}, {"messages": turns[:2]}]))
    corpus = read_corpus(ConversationSource("zh", f"{tmp_path}/x.json"))
    assert (len(corpus), corpus.empty_records) == (1, 1)


# Records as public sets have them, the source's `columns`, and what the alpaca record would be.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "firefly": (
        {"kind": "NLI", "input": "问", "target": "答"},
        {"instruction": "input", "output": "target"},
        {"instruction": "问", "output": "答"},
    ),
    "dolly": (
        {"instruction": "问", "context": "文", "response": "答", "category": "qa"},
        {"input": "context", "output": "response"},
        {"instruction": "问", "input": "文", "output": "答"},
    ),
    "capitals": (
        {"Instruction": "问", "kind answer": "答"},
        {"instruction": "Instruction", "output": "kind answer"},
        {"instruction": "问", "output": "答"},
    ),
    "swapped": (
        {"instruction": "答", "output": "问"},
        {"instruction": "output", "output": "instruction"},
        {"instruction": "问", "output": "答"},
    ),
    "replaced": (
        {"instruction": "问", "output": "raw", "response": "答"},
        {"output": "response"},
        {"instruction": "问", "output": "答"},
    ),
    "messages": (
        {"dialog": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"messages": "dialog"},
        {"instruction": "问", "output": "答"},
    ),
}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz", "x.parquet", "x.arrow"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_rename_keys(name: str, layout: str, tmp_path: Path) -> None:
    record, columns, meant = LAYOUTS[layout]
    renamed = conversations(write(tmp_path / name, [record, record]), columns=columns)
    assert renamed == conversations(write(tmp_path / f"meant{name}", [meant, meant]))


def test_a_column_that_some_records_have(tmp_path: Path) -> None:
    columns = {"instruction": "q", "output": "a", "input": "c"}
    records = [{"q": "1", "a": "2"}, {"q": "3", "a": "4", "c": "5"}, {"instruction": "6", "input": "7", "a": "8"}]
    for number, record in enumerate(records):
        (tmp_path / f"{number}.json").write_text(json.dumps([record]))
    expected = [[("user", "1"), ("assistant", "2")], [("user", "3\n5"), ("assistant", "4")],
                [("user", "6\n7"), ("assistant", "8")]]  # fmt: skip
    assert conversations(tmp_path, columns=columns) == expected
    # The source has it, although not each of its files does.
    (tmp_path / "1.json").unlink()
    with pytest.raises(ValueError, match=r"`sources\[0\].columns.input='c'`: no record has that key. .* has: 'q', 'a'"):
        conversations(tmp_path, columns=columns)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet"])
def test_a_column_that_no_record_has(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [record | {"id": 1} for record in RECORDS[:2]])
    with pytest.raises(
        ValueError, match=r"columns.system='prompt'`: no record has that key.* has: 'instruction', 'i.*, 'id'"
    ):
        conversations(path, columns={"system": "prompt"})
    path = write(path, [{"q": "1", "a": "2"}])
    message = r"`.*x.*` (line \d|row 0): .* `columns.instruction` names 'question', but its keys are 'q', 'a'"
    with pytest.raises(ValueError, match=message):
        conversations(path, columns={"instruction": "question", "output": "a"})


def test_columns_and_roles_together(tmp_path: Path) -> None:
    """A set with its own names for the list of turns, the roles and the flag of a record."""
    turns = [{"role": "Human", "content": "问"}, {"role": "MOSS", "content": "答", "weight": 1}]
    records = [{"chat": turns, "good": True, "prompt": "s"}, {"chat": turns, "good": False, "prompt": None}]
    path = write(tmp_path / "x.parquet", records)
    settings: dict[str, Any] = {
        "columns": {"messages": "chat", "label": "good", "system": "prompt"},
        "roles": {"Human": "user", "MOSS": "assistant"},
    }
    with pytest.raises(ValueError, match=r"x\.parquet` row 1: `good=False` says that this record is not to"):
        conversations(path, **settings)
    corpus = read_corpus(ConversationSource("zh", str(path), **settings), on_bad_record="skip")
    assert (len(corpus), corpus.bad_records) == (1, 1)
    assert load_conversation(corpus.text(0)) == [Turn("system", "s"), Turn("user", "问"), Turn("assistant", "答")]


@pytest.mark.parametrize(
    ("record", "message", "without"),
    [
        (
            {"instruction": "q", "response": 5},
            "`response`: expected a string, got int 5. Write it as text",
            "`columns.",
        ),
        ({"instruction": "q", "response": "a", "context": 5}, "`context`: expected a string, got int 5", "`input`"),
        ({"instruction": 5, "response": "a"}, "`instruction`: expected a string, got int 5", "`columns."),
        ({"question": "q", "response": "a"}, "and `response`; its keys are 'question', 'response'. Conv", "`columns."),
        ({"instruction": "q"}, "`columns.output` names 'response', but its keys are 'instruction'", "columns.input"),
    ],
)
def test_errors_name_the_sources_own_columns(record: Any, message: str, without: str, tmp_path: Path) -> None:
    whole = {"instruction": "q", "response": "a", "context": "c"}
    path = write(tmp_path / "x.json", [whole, record])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        conversations(path, columns={"input": "context", "output": "response"})
    assert without not in str(caught.value)


def test_marks_and_invisible_characters_are_no_text(tmp_path: Path) -> None:
    answers = ["\ufeffa", "\u200b", "\ufeff", "b\u200b", " \u2060\n"]
    path = write(tmp_path / "x.jsonl", [{"instruction": "\ufeffq", "output": answer} for answer in answers])
    path.write_text(path.read_text().replace("\n\n", "\n\ufeff"))
    corpus = read_corpus(ConversationSource("zh", str(path)))
    assert (len(corpus), corpus.empty_records) == (2, 3)
    assert conversations(path) == [[("user", "q"), ("assistant", answer)] for answer in ("a", "b\u200b")]
