import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_mixcn.text import ConversationSource, load_conversation, parse_sources, read_corpus

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
        ('{"instruction": "a", "output": "b"}', "x.json` is not JSON: expected an array of records; for one record a"),
        ('[{"instruction": "a"', "x.json` is not JSON: Expecting"),
        ('[{"instruction": "a", "output": "b"}] 3', "expected nothing behind the array, got '3'"),
        ('[{"instruction": "a", "output": "b"} 3]', "expected a comma or the array's end behind the record of line 1"),
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
        for roles in ({"用户": "user"}, {"用户": "user"}, {"用户": "user", "tool": "user"})
    ]
    assert stores[0] == stores[1] != stores[2]
    with pytest.raises(ValueError, match="the assistant speaks first"):
        conversations(path, roles={"用户": "assistant"})


@pytest.mark.parametrize("roles", [{"tool": "tool"}, {"tool": None}, {1: "user"}, ["tool"], "user"])
def test_a_role_means_user_assistant_or_system(roles: Any) -> None:
    with pytest.raises(ValueError, match=r"`sources\[0\]\.roles=.*: expected roles and what each means, one of system"):
        parse_sources([{"name": "zh", "path": "x", "roles": roles}], "sources", ConversationSource)
