"""Keys of records and turns: obeyed, refused by name, or metadata."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_mixcn.text import BadRecordPolicy, ConversationSource, Turn, load_conversation, read_corpus
from lightning_mixcn.text.conversations import EmptyTurnError, read_conversation, read_training_conversation

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
BAD = {"role": "assistant", "content": "BAD"}
MESSAGES = {"messages": [USER, ANSWER]}
ALPACA = {"instruction": "Why?", "output": "So."}


def learned(record: dict[str, Any]) -> list[str]:
    return [turn.content for turn in read_training_conversation(record) if turn.role == "assistant" and turn.learned]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("no", [0, 0.0, False])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_flagged_answer_stays_and_is_not_learned(key: str, no: float, form: str) -> None:
    turns = [USER, {**BAD, key: no}, USER, {**ANSWER, key: type(no)(1)}, USER, ANSWER, USER, {**ANSWER, key: None}]
    read = read_training_conversation({form: turns})
    assert [turn.content for turn in read if turn.role == "assistant"] == ["BAD", "So.", "So.", "So."]
    assert [turn.learned for turn in read if turn.role == "assistant"] == [False, True, True, True]


@pytest.mark.parametrize("value", [0.5, 2, -1, float("nan"), "0", "false", [0], {"a": 1}])
@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_flag_that_cannot_be_obeyed_is_refused(key: str, value: Any) -> None:
    message = re.escape(f"`messages[1].{key}={value!r}`: expected 1 or true (learned), or 0 or false (not learned)")
    with pytest.raises(ValueError, match=message):
        read_training_conversation({"messages": [USER, {**ANSWER, key: value}]})
    with pytest.raises(ValueError, match=re.escape(f"`{key}={value!r}`: expected 1 or true")):
        read_training_conversation(MESSAGES | {key: value})


def test_flags_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"`messages\[1\]`: `weight=1` and `train=False` contradict each other"):
        learned({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]})
    assert learned({"messages": [USER, {**ANSWER, "weight": 1, "train": True}]}) == ["So."]


def test_only_answers_can_be_learned() -> None:
    with pytest.raises(ValueError, match=r"`messages\[0\]` is flagged as to be learned, but only the assistant's"):
        learned({"messages": [{**USER, "train": True}, ANSWER]})
    assert learned({"messages": [{**USER, "weight": 0}, {**ANSWER, "weight": 1}]}) == ["So."]


@pytest.mark.parametrize("key", ["label", "kto_tag", "weight", "train", "loss"])
@pytest.mark.parametrize("record", [MESSAGES, ALPACA])
def test_a_flagged_record_is_refused(key: str, record: dict[str, Any]) -> None:
    for no in (False, 0):
        with pytest.raises(ValueError, match=f"`{key}={no!r}` says that this record is not to be learned. Remove it"):
            learned(record | {key: no})
    assert learned(record | {key: True}) == learned(record | {key: 1}) == ["So."]
    assert len(read_conversation(record | {key: False})) == 2  # as a question, it can be asked


def test_a_record_without_any_learned_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="every answer is flagged as not to be learned"):
        learned({"messages": [USER, {**ANSWER, "weight": 0}]})


VALUES = [
    ("tool_calls", [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]),
    ("function_call", {"name": "look", "arguments": "{}"}),
    ("tools", [{"name": "look"}]),
    ("tools", '[{"name": "look"}]'),
    ("functions", [{"name": "look"}]),
    ("images", ["a.png"]),
    ("image", b"\xff"),
    ("videos", ["a.mp4"]),
    ("audios", ["a.wav"]),
    ("reasoning", "Hm."),
    ("reasoning_content", "Hm."),
    ("thinking", "Hm."),
    ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]),
]


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_what_cannot_be_rendered_is_refused_by_name(key: str, value: Any) -> None:
    for record in (MESSAGES, ALPACA, {"conversations": [{"human": "Why?", "assistant": "So."}]}):
        with pytest.raises(ValueError, match=f"^`{key}="):
            read_conversation(record | {key: value})
    for content in ("So.", "", None):
        with pytest.raises(ValueError, match=rf"`messages\[1\]` has `{key}="):
            read_conversation({"messages": [USER, {"role": "assistant", "content": content, key: value}]})
    with pytest.raises(ValueError, match=rf"`messages\[1\]` has `{key}="):
        read_conversation({"messages": [USER, {"role": "assistant", key: value}]})


@pytest.mark.parametrize("key", sorted({key for key, _ in VALUES}))
def test_what_is_empty_counts_as_absent(key: str) -> None:
    nothings: list[Any] = [None, "", [], {}, False, "[]", " ", {"name": None, "arguments": ""}]
    for nothing in nothings:
        record = {"messages": [USER, {**ANSWER, key: nothing}], key: nothing}
        assert learned(record) == ["So."]


@pytest.mark.parametrize("key", ["name", "tool_call_id", "refusal", "prefix", "weights", "Train", "loss_mask", "value"])
def test_an_unknown_key_of_a_turn_is_refused_by_name(key: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`messages\[1\]` has `{key}='x'`: a turn may have only role, content, weight"
    ):
        learned({"messages": [USER, {**ANSWER, key: "x"}]})


def test_metadata_is_not_read() -> None:
    turn = {**ANSWER, "id": 7, "timestamp": 1.5, "model": "m", "lang": "zh"}
    assert learned({"messages": [USER, turn], "id": "a", "source": "s", "score": 0, "category": ["x"]}) == ["So."]


@pytest.mark.parametrize("value", [0, 1, 1.5, False, True, ["a"], [], {}, {"a": 1}])
@pytest.mark.parametrize("key", ["instruction", "input", "output", "system"])
def test_what_is_no_text_is_refused_in_every_field(key: str, value: Any) -> None:
    message = re.escape(f"`{key}`: expected a string, got {type(value).__name__} {value!r}")
    with pytest.raises(ValueError, match=message):
        read_conversation(ALPACA | {key: value})


@pytest.mark.parametrize("value", [0, 1, 1.5, False, True, {"a": 1}, ["a"], [0]])
@pytest.mark.parametrize("place", [0, 1])
def test_a_content_is_text(place: int, value: Any) -> None:
    turns: list[dict[str, Any]] = [dict(USER), dict(ANSWER)]
    turns[place]["content"] = value
    with pytest.raises(ValueError, match=rf"`messages\[{place}\]\.content(\[0\])?`: expected a"):
        read_conversation({"messages": turns})


@pytest.mark.parametrize("value", [0, False, True, {}, {"q": "a"}, "q", [["q"]], ["qa"], [["q", "a", "b"]], [["q", 0]]])
def test_a_history_is_pairs_of_texts(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`history(\[0\])?`: expected a"):
        read_conversation(ALPACA | {"history": value})


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "thinking", "tool_use", "refusal", None])
def test_parts_of_other_types_are_refused(kind: str | None) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, "text": "b"}]
    with pytest.raises(ValueError, match=r"`messages\[0\]\.content\[1\]`: expected a part of type text"):
        read_conversation({"messages": [{"role": "user", "content": parts}, ANSWER]})
    parts[1] = {"type": "text", "text": "b", "image_url": None}  # as a table writes it
    assert read_conversation({"messages": [{"role": "user", "content": parts}, ANSWER]})[0].content == "ab"


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_system_prompt_beside_the_turns(form: str) -> None:
    turns = read_conversation({form: [USER, ANSWER], "system": "Be kind."})
    assert turns[0] == Turn("system", "Be kind.")
    assert [turn.role for turn in read_conversation({form: [USER, ANSWER], "system": " "})] == ["user", "assistant"]
    system = {"role": "system", "content": "Be short."}
    with pytest.raises(ValueError, match=f"the record has `system` and `{form}` a system turn. Keep one"):
        read_conversation({form: [system, USER, ANSWER], "system": "Be kind."})
    with pytest.raises(ValueError, match="turn 1 is the system's"):
        read_conversation({form: [system, system, USER, ANSWER]})


def test_what_another_form_has_is_not_dropped() -> None:
    with pytest.raises(ValueError, match=r"keys of messages and alpaca\. Set the source's `records`"):
        read_conversation(MESSAGES | ALPACA)
    with pytest.raises(ValueError, match="`history` beside `messages` is not read"):
        read_conversation(MESSAGES | {"history": [["q", "a"]]})
    with pytest.raises(ValueError, match=r"`context`. Say `columns: {input: context}`"):
        read_conversation(ALPACA | {"context": "x"})


@pytest.mark.parametrize("nothing", ["", " ", "\n\t", "\u3000"])
def test_an_empty_turn_is_left_out_and_counted(nothing: str, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        ALPACA,
        ALPACA | {"output": nothing},
        ALPACA | {"instruction": nothing},
        ALPACA | {"history": [["q", nothing]]},
        {"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": nothing}]}]},
        {"messages": [USER, {**ANSWER, "content": []}]},
    ]
    for record in records[1:]:
        with pytest.raises(EmptyTurnError, match=r"turn \d, the (user|assistant)'s, is empty"):
            read_training_conversation(record)
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    policies: tuple[BadRecordPolicy, ...] = ("error", "skip")
    for policy in policies:
        corpus = read_corpus(ConversationSource("x", str(tmp_path / "s.jsonl")), on_bad_record=policy)
        assert (len(corpus), corpus.bad_records, corpus.empty_records) == (1, 0, 5)


def test_a_table_has_every_key_in_every_row(tmp_path: Path) -> None:
    """Columns and fields that only some records use are null in the others, and are read where they are not."""
    flagged = {"messages": [USER, {**BAD, "weight": 0}, USER, ANSWER]}
    parquet.write_table(pyarrow.Table.from_pylist([MESSAGES | {"tools": None}, flagged]), tmp_path / "a.parquet")
    corpus = read_corpus(ConversationSource("x", str(tmp_path / "a.parquet")))
    turns = load_conversation(corpus.text(1))
    assert [turn.learned for turn in turns if turn.role == "assistant"] == [False, True]
    called = MESSAGES | {"tools": "[{}, 1]", "images": [b"x"], "label": False}
    parquet.write_table(
        pyarrow.Table.from_pylist([MESSAGES | dict.fromkeys(("tools", "images", "label")), called]),
        tmp_path / "b.parquet",
    )
    with pytest.raises(ValueError, match=r"b\.parquet` row 1: `tools="):
        read_corpus(ConversationSource("x", str(tmp_path / "b.parquet")))
