import re
from typing import Any

import pytest

from lightning_mixcn.text import RecordFormat, Turn, load_conversation
from lightning_mixcn.text.chat.records import dump_conversation, read_conversation

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
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "`messages[0].content[0]`: expected a part of type text",
        ),
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
    turns[2] = Turn("assistant", "</s>", learned=False)
    assert load_conversation(dump_conversation(turns).decode()) == turns


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
        [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
        [{"human": "问", "assistant": "答"}],
        [{"assistant": "答", "human": "问"}],
        [{"human": "问"}, {"gpt": "答"}],
        [{"role": "user", "content": "问", "from": None}, {"from": "gpt", "value": "答", "role": None}],
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_layouts_of_turns(key: str, turns: list[dict[str, str]]) -> None:
    assert spoken({key: turns}) == [("user", "问"), ("assistant", "答")]


ROLES = {"<|Human|>": "user", "<|MOSS|>": "assistant", "用户": "user", "助手": "assistant", "developer": "system"}


@pytest.mark.parametrize(("asks", "answers"), [("<|Human|>", "<|MOSS|>"), ("用户", "助手"), ("human", "助手")])
def test_further_roles(asks: str, answers: str) -> None:
    turns = [{"role": "developer", "content": "s"}, {"role": asks, "content": "问"}, {"role": answers, "content": "答"}]
    read = read_conversation({"messages": turns}, roles=ROLES)
    assert [(turn.role, turn.content) for turn in read] == [("system", "s"), ("user", "问"), ("assistant", "答")]
    (pair,) = [{asks: "问", answers: "答"}]
    assert [turn.role for turn in read_conversation({"conversations": [pair]}, roles=ROLES)] == ["user", "assistant"]


@pytest.mark.parametrize("role", ["tool", "developer", "Human", "USER", "用户", "", None, 3, ["user"]])
def test_an_unknown_role_is_refused_with_the_remedy(role: Any) -> None:
    with pytest.raises(ValueError, match=r"`messages\[0\]") as refused:
        read_conversation({"messages": [{"role": role, "content": "x"}, MESSAGES["messages"][1]]})
    assert role is None or f"role={role!r}`: expected one of human, user" in str(refused.value)
    assert role is None or "`roles: {tool: user}`" in str(refused.value)
