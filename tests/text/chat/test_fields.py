"""Keys of records and turns: obeyed, refused by name, or metadata."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_mixcn.text import (
    BadRecordPolicy,
    ConversationSource,
    Turn,
    load_conversation,
    read_corpus,
)
from lightning_mixcn.text.chat.records import EmptyTurnError, read_conversation, read_training_conversation

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
BAD = {"role": "assistant", "content": "BAD"}
MESSAGES = {"messages": [USER, ANSWER]}
ALPACA = {"instruction": "Why?", "output": "So."}


def learned(record: dict[str, Any]) -> list[str]:
    return [turn.content for turn in read_training_conversation(record) if turn.role == "assistant" and turn.learned]


@pytest.mark.parametrize("key", ["weight", "train", "loss", "label"])
@pytest.mark.parametrize("no", [0, 0.0, False])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_flagged_answer_stays_and_is_not_learned(key: str, no: float, form: str) -> None:
    turns = [USER, {**BAD, key: no}, USER, {**ANSWER, key: type(no)(1)}, USER, ANSWER, USER, {**ANSWER, key: None}]
    read = read_training_conversation({form: turns})
    assert [turn.content for turn in read if turn.role == "assistant"] == ["BAD", "So.", "So.", "So."]
    assert [turn.learned for turn in read if turn.role == "assistant"] == [False, True, True, True]


@pytest.mark.parametrize("value", [0.5, 2, -1, float("nan"), "0", "false", [0], {"a": 1}])
@pytest.mark.parametrize("key", ["weight", "train", "loss", "label"])
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
    nothings: list[Any] = [None, "", [], {}, "[]", " ", {"name": None, "arguments": ""}]
    for nothing in [*nothings, *([] if key == "train_detail" else [False])]:
        record = {"messages": [USER, {**ANSWER, key: nothing}], key: nothing}
        assert learned(record) == ["So."]


@pytest.mark.parametrize("key", ["name", "tool_call_id", "refusal", "prefix", "weights", "Train", "loss_mask", "value"])
def test_an_unknown_key_of_a_turn_is_refused_by_name(key: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`messages\[1\]` has `{key}='x'`: a turn may have only role, content, weight"
    ):
        learned({"messages": [USER, {**ANSWER, key: "x"}]})


@pytest.mark.parametrize("no", [False, 0, [0, 0], [False]])
@pytest.mark.parametrize(
    "key", ["learn", "trainable", "mask", "loss_mask", "train_detail", "is_learned", "train_on_turn"]
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_turn_that_says_no_in_other_words_is_refused(key: str, no: Any, number: int) -> None:
    turns: list[dict[str, Any]] = [dict(USER), dict(ANSWER)]
    turns[number][key] = no
    with pytest.raises(ValueError, match=re.escape(f"`messages[{number}]` has `{key}={no!r}`")):
        learned({"messages": turns})


@pytest.mark.parametrize(
    "key", ["learn", "trainable", "mask", "loss_mask", "loss_scale", "train_detail", "loss_weight"]
)
@pytest.mark.parametrize("record", [MESSAGES, ALPACA])
def test_a_record_that_says_no_in_other_words_is_refused(key: str, record: dict[str, Any]) -> None:
    for value in (False, True, 0, 1, [0, 1], [False], "false"):
        with pytest.raises(ValueError, match=re.escape(f"`{key}={value!r}`: ")):
            read_conversation(record | {key: value})
    assert learned(record | {key: None}) == learned(record | {key: []}) == ["So."]


@pytest.mark.parametrize("key", ["train_on_input", "train_on_inputs", "train_on_prompt", "ignore", "skip"])
def test_a_switch_that_is_off_says_what_is_done_anyway(key: str) -> None:
    assert learned(ALPACA | {key: False}) == ["So."]
    with pytest.raises(ValueError, match=f"`{key}=True`"):
        learned(ALPACA | {key: True})


@pytest.mark.parametrize("key", ["train", "weight", "loss", "mask", "cache_control"])
def test_a_part_with_a_flag_is_refused(key: str) -> None:
    for no in (False, 0):
        part = {"type": "text", "text": "So.", key: no}
        with pytest.raises(
            ValueError, match=r"`messages\[1\]\.content\[0\]`: expected a part of type text and nothing"
        ):
            learned({"messages": [USER, {"role": "assistant", "content": [part]}]})


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


LISTED = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}


@pytest.mark.parametrize("key", ["instruction", "input", "output", "context", "prompt", "response", "question",
                                 "answer", "query", "completion", "target", "problem", "solution", "chosen",
                                 "rejected", "conversation", "dialog"])  # fmt: skip
@pytest.mark.parametrize("value", ["Be rude.", ["Be rude."], 0, False])
def test_what_a_list_form_does_not_read_is_refused(key: str, value: Any) -> None:
    for record, form, own in ((MESSAGES, "messages", "messages"), (LISTED, "sharegpt", "conversations")):
        message = f"`{key}={value!r}` is not read beside `{own}`"
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            read_conversation(record | {key: value})
        assert f"`records: {form}`" in str(refused.value)
        stated: Any = form
        assert read_conversation(record | {key: value}, stated) == read_conversation(record)
    with pytest.raises(ValueError, match=r"`columns: \{system: instruction\}`"):
        read_conversation(MESSAGES | {"instruction": "Be rude."})


@pytest.mark.parametrize("key", ["prompt", "response", "question", "answer", "query", "completion", "target", "chosen",
                                 "rejected", "conversation", "chat"])  # fmt: skip
def test_what_alpaca_does_not_read_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`{key}='x'` is not read beside `instruction`")):
        read_conversation(ALPACA | {key: "x"})
    assert len(read_conversation(ALPACA | {key: "x"}, "alpaca")) == 2


@pytest.mark.parametrize(
    "key", ["meta_instruction", "meta_prompt", "system_message", "system_prompt", "system_instruction"]
)
def test_a_system_prompt_of_another_name_is_refused(key: str) -> None:
    for record in (MESSAGES, LISTED, ALPACA):
        for form in (None, "messages" if record is MESSAGES else "sharegpt" if record is LISTED else "alpaca"):
            stated: Any = form
            with pytest.raises(ValueError, match=rf"`{key}='Be kind\.'`.*`columns: \{{system: {key}\}}`"):
                read_conversation(record | {key: "Be kind."}, stated)
        assert len(read_conversation(record | {key: ""})) == 2
        assert read_conversation(record | {key: "Be kind.", "system": "Be kind."})[0] == Turn("system", "Be kind.")


@pytest.mark.parametrize("key", ["cot", "rationale", "chain_of_thought"])
def test_reasoning_beside_the_answer_is_refused(key: str) -> None:
    for record in (MESSAGES, ALPACA):
        with pytest.raises(ValueError, match=f"^`{key}='Hm.'`: no template writes it"):
            read_conversation(record | {key: "Hm."})


def test_what_repeats_a_turn_is_metadata() -> None:
    """As UltraChat, No Robots and NuminaMath have it."""
    system = {"role": "system", "content": "Be kind."}
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Thus."}]
    records: list[dict[str, Any]] = [
        {"prompt": "Why?", "prompt_id": "f0", "messages": [USER, ANSWER, *more]},
        {"prompt": "Be kind.", "prompt_id": "f0", "messages": [system, USER, ANSWER], "category": "Chat"},
        {"source": "aime", "problem": "Why? ", "solution": "So.", "messages": [USER, ANSWER]},
        ALPACA | {"prompt": "Why?", "response": "So."},
    ]
    for record in records:
        assert learned(record)[0] == "So."
    for key, value in (("prompt", "And?"), ("prompt", "So."), ("response", "So."), ("response", "Why?")):
        with pytest.raises(ValueError, match=rf"`{key}='.*'` is not read"):
            learned({"messages": [USER, ANSWER, *more], key: value})


PUBLIC: list[dict[str, Any]] = [
    ALPACA | {"input": "", "text": "Below is an instruction ...", "instruction_zh": "x", "output_zh": "y"},  # alpaca-zh
    LISTED | {"id": "a_1", "model": "gpt-4", "hash": "f0", "views": 3, "category": None},  # ShareGPT, OpenHermes
    MESSAGES
    | {"source": "oasst1", "lang": "zh", "message_tree_id": "f0", "labels": {"name": ["spam"], "value": [0.1]}},
    ALPACA | {"task_type": {"major": ["qa"]}, "domain": ["x"], "human_verified": False, "answer_from": "human"},  # COIG
    LISTED | {"system": "", "tools": "[]", "skip_prompt_formatting": False, "score": 0.5, "reward": -1.5},
    MESSAGES | {"instruction": "", "input": "", "output": "", "history": []},
]


@pytest.mark.parametrize("record", PUBLIC)
def test_metadata_of_public_sets(record: dict[str, Any]) -> None:
    assert learned(record) == ["So."]


NAMED_BY_COLUMNS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "NLI", "input": "q", "target": "a"}, "{instruction: input, output: target}"),
    (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        "{input: context, output: response}",
    ),
    (
        {"id": 1, "system_prompt": "s", "question": "q", "response": "a"},
        "{instruction: question, output: response, system: system_prompt}",
    ),
    ({"prompt": "q", "completion": "a"}, "{instruction: prompt, output: completion}"),
    ({"conversation_id": "1", "conversation": [USER, ANSWER]}, "{messages: conversation}"),
    ({"meta_instruction": "s", "chat": [USER, ANSWER]}, "{messages: chat, system: meta_instruction}"),
    ({"q": "x", "a": "y"}, "{instruction: input, output: target}"),
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
@pytest.mark.parametrize(("record", "columns"), NAMED_BY_COLUMNS)
def test_an_unknown_form_is_told_of_columns(name: str, record: dict[str, Any], columns: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.jsonl":
        path.write_text(json.dumps(record))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    with pytest.raises(ValueError, match=re.escape(f"`columns: {columns}`")):
        read_corpus(ConversationSource("x", str(path)))
    if "q" not in record:  # what is suggested is a remedy
        given = dict(pair.split(": ") for pair in columns.strip("{}").split(", "))
        assert len(read_corpus(ConversationSource("x", str(path), columns=given))) == 1


def test_a_table_reads_the_keys_that_are_refused(tmp_path: Path) -> None:
    refused: dict[str, Any] = {"prompt": "Be rude.", "mask": False, "meta_instruction": "s", "cot": "Hm."}
    for key, value in refused.items():
        path = tmp_path / f"{key}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([MESSAGES | {key: value}]), path)
        with pytest.raises(ValueError, match=rf"parquet` row 0: `{key}="):
            read_corpus(ConversationSource("x", str(path)))


@pytest.mark.parametrize("nothing", ["", " ", "\n\t", "\u3000", [], [{"type": "text", "text": ""}], None])
def test_an_empty_system_turn_is_left_out(nothing: Any) -> None:
    system = {"role": "system", "content": nothing}
    assert [turn.role for turn in read_conversation({"messages": [system, USER, ANSWER]})] == ["user", "assistant"]
    system = {"from": "system", "value": nothing}
    assert read_conversation({"conversations": [system, USER, ANSWER], "system": "s"})[0] == Turn("system", "s")
    if isinstance(nothing, str):
        pair = {"system": nothing, "human": "Why?", "assistant": "So."}
        assert len(read_conversation({"conversations": [pair]})) == 2
    with pytest.raises(ValueError, match=r"`messages\[0\]` has `loss_mask=False`"):
        read_conversation({"messages": [{"role": "system", "content": nothing, "loss_mask": False}, USER, ANSWER]})


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
