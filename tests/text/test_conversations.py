import re
from typing import Any

import pytest

from lightning_mixcn.text import RecordFormat, load_conversation
from lightning_mixcn.text.conversations import dump_conversation, read_conversation

ALPACA = {"instruction": "问", "input": "", "output": "答"}
SHAREGPT = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
MESSAGES = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}


def spoken(record: dict[str, Any], form: RecordFormat | None = None) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in read_conversation(record, form)]


@pytest.mark.parametrize("record", [ALPACA, SHAREGPT, MESSAGES])
def test_each_form_is_told_by_its_keys(record: dict[str, Any]) -> None:
    assert spoken(record) == [("user", "问"), ("assistant", "答")]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (ALPACA | {"input": "x"}, [("user", "问\nx"), ("assistant", "答")]),
        (ALPACA | {"system": "s"}, [("system", "s"), ("user", "问"), ("assistant", "答")]),
        (
            ALPACA | {"history": [["q", "a"]]},
            [("user", "q"), ("assistant", "a"), ("user", "问"), ("assistant", "答")],
        ),
        (ALPACA | {"input": None, "history": None, "output": ""}, [("user", "问"), ("assistant", "")]),
        (SHAREGPT | {"system": "s"}, [("system", "s"), ("user", "问"), ("assistant", "答")]),
        (
            {"messages": [{"role": "system", "content": "s"}, *MESSAGES["messages"]]},
            [("system", "s"), ("user", "问"), ("assistant", "答")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    MESSAGES["messages"][1],
                ]
            },
            [("user", "ab"), ("assistant", "答")],
        ),
    ],
)
def test_what_a_record_may_have(record: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert spoken(record) == turns


def test_a_stated_form_is_taken() -> None:
    assert spoken(SHAREGPT | ALPACA, "alpaca") == spoken(ALPACA)
    with pytest.raises(ValueError, match=r"no key 'messages', which messages records have; its keys are 'instruction'"):
        read_conversation(ALPACA, "messages")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "it has no keys"),
        ({"question": "x", "answer": "y"}, "`messages`, `conversations`, or `instruction` and `output`; its keys are"),
        ({"instruction": "x"}, "its keys are 'instruction'"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "x"}, "`messages`: expected a list of turns, got str"),
        ({"messages": [{"role": "user"}]}, "`messages[0]`: expected `role` and `content`, got {'role': 'user'}"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "`messages[0].role='tool'`: expected one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "`messages[0].content`: expected a string, got int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ({"messages": [*MESSAGES["messages"], MESSAGES["messages"][0]]}, "the last turn is the user's"),
        ({"messages": [MESSAGES["messages"][0]] * 2}, "turns 0 and 1 are both the user's"),
        ({"messages": [MESSAGES["messages"][1]]}, "the assistant speaks first"),
        ({"conversations": [{"from": "human", "value": "\ud800"}]}, "is not valid Unicode"),
        (ALPACA | {"history": ["x"]}, "`history[0]`: expected a pair"),
        (ALPACA | {"history": [["x", 1]]}, "`history[0]`: expected a string, got int"),
        (ALPACA | {"output": None}, "`output`: expected a string, got NoneType"),
    ],
)
def test_what_is_no_conversation_says_why(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_conversation(record)


def test_what_is_written_is_read() -> None:
    turns = read_conversation(ALPACA | {"system": '"引号"\n', "history": [["[INST]", "</s>"]]})
    assert load_conversation(dump_conversation(turns).decode()) == turns
