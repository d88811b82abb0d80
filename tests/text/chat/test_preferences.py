"""Records of preference in the layouts that people have; what they lack is named."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_mixcn.text import PreferenceSource, Turn, parse_sources, read_corpus
from lightning_mixcn.text.chat.preferences import (
    CHOSEN,
    MISMATCHED,
    REJECTED,
    JudgedAnswer,
    Preference,
    load_preference,
    read_preference,
)

PAIR = {"chosen": "So.", "rejected": "No."}
USER, GOOD, BAD = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "assistant", "content": "No."},
)
EXPECTED = Preference([Turn("user", "Why?")], (JudgedAnswer("So.", CHOSEN), JudgedAnswer("No.", REJECTED)))

PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Why?", **PAIR},
    "prompt of messages": {"prompt": [USER], **PAIR},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "one message a side": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations beside their prompt": {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "conversations and two texts": {"conversations": [{"from": "human", "value": "Why?"}], **PAIR},
    "alpaca": {"instruction": "Why?", "input": "", **PAIR},
    "ratings": {
        "prompt": "Why?",
        "answers": [
            {"content": "Hm.", "rating": 3},
            {"content": "So.", "rating": 4.5},
            {"content": "No.", "rating": 1},
            {"content": "Ha.", "rating": 1},
        ],
    },
    "metadata": {"prompt": "Why?", **PAIR, "id": 7, "source": "web", "margin": 0.3},
}


@pytest.mark.parametrize("form", PAIRS)
def test_the_layouts_say_the_same(form: str) -> None:
    assert read_preference(PAIRS[form]) == EXPECTED


def test_earlier_turns_and_a_system_prompt_belong_to_the_prompt() -> None:
    turns = [USER, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "Well?"}]
    expected = [Turn("system", "Be brief."), Turn("user", "Why?"), Turn("assistant", "Hm."), Turn("user", "Well?")]
    told = {"system": "Be brief.", "prompt": turns, **PAIR}
    assert read_preference(told).prompt == expected
    said = [{"role": "system", "content": "Be brief."}, *turns]
    assert read_preference({"chosen": [*said, GOOD], "rejected": [*said, BAD]}).prompt == expected
    alpaca = {"system": "Be brief.", "instruction": "Well?", "history": [["Why?", "Hm."]], **PAIR}
    assert read_preference(alpaca).prompt == expected


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "completion": "So.", "label": True},
        {"messages": [USER, GOOD], "kto_tag": True},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "label": True},
        {"instruction": "Why?", "completion": "So.", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": True},
    ],
)
def test_an_answer_with_a_verdict(record: dict[str, Any]) -> None:
    assert read_preference(record) == Preference([Turn("user", "Why?")], (JudgedAnswer("So.", CHOSEN),))
    key = "label" if "label" in record else "kto_tag"
    assert read_preference(record | {key: False}).answers == (JudgedAnswer("So.", REJECTED),)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no answers": ({"prompt": "Why?"}, "its keys are 'prompt': expected either `chosen` and `rejected`, or"),
    "one side": ({"prompt": "Why?", "chosen": "So."}, "no key `rejected` beside `chosen`. Give both"),
    "two forms": ({"prompt": "Why?", **PAIR, "label": True}, "has `chosen` and `rejected` and `label`: expected"),
    "the same": ({"prompt": "Why?", "chosen": "So.", "rejected": "So. "}, "answer are the same, 'So.': nothing is"),
    "empty": ({"prompt": "Why?", "chosen": "So.", "rejected": " \n"}, "the rejected answer is empty. Write it"),
    "empty prompt": ({"prompt": [USER | {"content": " "}], **PAIR}, "turn 0 of the prompt, the user's, is empty"),
    "no prompt": (PAIR, "no prompt: expected `prompt`, `messages`, `conversations` or `instruction`"),
    "two prompts": ({"prompt": "Why?", "instruction": "How?", **PAIR}, "has `prompt` and `instruction`. Keep one"),
    "other prompts": (
        {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "How?"}, BAD]},
        "`chosen` and `rejected` answer different prompts",
    ),
    "another prompt beside": ({"prompt": "How?", "chosen": [USER, GOOD], "rejected": "No."}, "not those of `prompt`"),
    "a user's answer": ({"prompt": "Why?", "chosen": [USER], "rejected": "No."}, "expected one of the assistant"),
    "a number": ({"prompt": "Why?", "chosen": 1, "rejected": "No."}, "an answer is 1: expected a text, a message, or"),
    "prompt ends with an answer": ({"prompt": [USER, GOOD], **PAIR}, "turns 1 and 2 are both the assistant's"),
    "verdict": ({"prompt": "Why?", "completion": "So.", "label": 1}, "`label=1`: expected true or false"),
    "verdict on nothing": ({"instruction": "Why?", "label": True}, "expected the answer in `completion`"),
    "one rating": ({"prompt": "Why?", "answers": [{"text": "So.", "score": 1}]}, "`answers`: expected a list of at"),
    "no rating": ({"prompt": "Why?", "answers": [{"content": "a"}, {"content": "b"}]}, "`answers[0]`: expected a text"),
    "equal ratings": (
        {"prompt": "Why?", "answers": [{"text": "a", "score": 2}, {"text": "b", "score": 2}]},
        "all `answers` are rated 2: nothing is preferred",
    ),
    "tools": ({"prompt": "Why?", **PAIR, "tools": ["f"]}, "`tools=['f']`: no template writes tools"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_is_named_with_file_and_line(fault: str, tmp_path: Path) -> None:
    record, message = BROKEN[fault]
    with pytest.raises(ValueError, match=re.escape(message)):
        read_preference(record)
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(entry) for entry in (PAIRS["texts"], record)))
    with pytest.raises(ValueError, match=rf"pairs\.jsonl` line 2: .*{re.escape(message)}"):
        read_corpus(PreferenceSource("zh", str(file)))
    assert len(read_corpus(PreferenceSource("zh", str(file)), on_bad_record="skip")) == 1


def test_files_in_every_format_and_renamed_keys(tmp_path: Path) -> None:
    record = {"question": "Why?", "better": "So.", "worse": "No."}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (tmp_path / "a.json").write_text(json.dumps([record, record | {"question": "How?"}]))
    (tmp_path / "b.jsonl").write_text(json.dumps(record))
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "c.parquet")
    for name, count in {"a.json": 2, "b.jsonl": 1, "c.parquet": 1}.items():
        corpus = read_corpus(PreferenceSource("zh", str(tmp_path / name), columns=columns))
        assert len(corpus) == count
        assert load_preference(corpus.text(0)) == EXPECTED
    messages = pyarrow.Table.from_pylist([PAIRS["messages"], PAIRS["messages"]])
    parquet.write_table(messages, tmp_path / "d.parquet")
    assert load_preference(read_corpus(PreferenceSource("zh", str(tmp_path / "d.parquet"))).text(1)) == EXPECTED
    with pytest.raises(ValueError, match=r"columns=\{'output': 'x'\}`: expected null, or the records' name of each"):
        parse_sources([PreferenceSource("zh", "b.jsonl", columns={"output": "x"})], "sources", PreferenceSource)


def test_answers_with_a_verdict_get_an_answer_to_another_prompt(tmp_path: Path) -> None:
    """Good and bad answers to a prompt often follow each other: neither is a mismatched one of it."""
    file = tmp_path / "kto.jsonl"
    records = [{"prompt": f"{n}?", "completion": f"{n}{side}", "label": side == "+"} for n in range(3) for side in "+-"]
    file.write_text("\n".join(map(json.dumps, [records[0], PAIRS["texts"], *records[1:]])))
    corpus = read_corpus(PreferenceSource("zh", str(file)))
    found = [load_preference(corpus.text(index)).answers for index in range(len(corpus))]
    assert EXPECTED.answers in found
    judged = [answers for answers in found if answers != EXPECTED.answers]
    assert [tuple(answer.text for answer in answers) for answers in judged] == [
        ("0+", "1+"), ("0-", "1+"), ("1+", "0-"), ("1-", "0-"), ("2+", "1-"), ("2-", "1-"),
    ]  # fmt: skip
    assert [answers[0].side for answers in judged] == [CHOSEN, REJECTED] * 3
    assert {answers[1].side for answers in judged} == {MISMATCHED}
    file.write_text("\n".join(map(json.dumps, records[:2])))
    with pytest.raises(ValueError, match=r"kto\.jsonl`: answers with a verdict to one prompt alone: KTO compares"):
        read_corpus(PreferenceSource("zh", str(file)))
