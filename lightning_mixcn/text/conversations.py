"""Conversations, and the forms of records in which people keep them.

* ``alpaca``: ``instruction``, ``output``, perhaps ``input``, ``system``, ``history`` (pairs of question and answer);
* ``sharegpt``: ``conversations``, a list of ``from`` and ``value``, and perhaps ``system``;
* ``messages``: ``messages``, a list of ``role`` and ``content``, as in OpenAI's interface.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_mixcn.text.chat_template import Turn, check_turns

RecordFormat = Literal["alpaca", "sharegpt", "messages"]

# The key that tells each form.
_TELLING_KEYS: dict[RecordFormat, str] = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
}
# What a record may have, of any form.
RECORD_KEYS = frozenset({*_TELLING_KEYS.values(), "input", "output", "system", "history"})
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_conversation(record: Mapping[str, Any], form: RecordFormat | None = None) -> list[Turn]:
    """Read a record as a conversation.

    Args:
        record: The record.
        form: Its form; None tells it from the record's keys.

    Returns:
        The turns: perhaps one of the system, then user and assistant in turn; the last one is the assistant's.

    Raises:
        ValueError: The record has another form, or is no conversation that can be learnt from.
    """
    form = form or _form_of(record)
    if _TELLING_KEYS[form] not in record:
        raise ValueError(f"no key {_TELLING_KEYS[form]!r}, which {form} records have; {_keys(record)}")
    turns = {"alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages}[form](record)
    check_turns(turns)
    if turns[-1].role != "assistant":
        raise ValueError("the last turn is the user's, so there is no answer to learn from. Remove that turn")
    return turns


def dump_conversation(turns: Sequence[Turn]) -> bytes:
    """Write a conversation as UTF-8, the same for every form it was read from."""
    return json.dumps([[turn.role, turn.content] for turn in turns], ensure_ascii=False).encode()


def load_conversation(text: str) -> list[Turn]:
    """Read what `dump_conversation` wrote."""
    return [Turn(role, content) for role, content in json.loads(text)]


def _form_of(record: Mapping[str, Any]) -> RecordFormat:
    for form, key in _TELLING_KEYS.items():
        if key in record and (form != "alpaca" or "output" in record):
            return form
    raise ValueError(
        "expected `messages`, `conversations`, or `instruction` and `output`; "
        f"{_keys(record)}. Convert the records to one of these forms"
    )


def _keys(record: Mapping[str, Any]) -> str:
    return f"its keys are {', '.join(map(repr, record))}" if record else "it has no keys"


def _alpaca(record: Mapping[str, Any]) -> list[Turn]:
    turns = _system(record)
    for number, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"`history[{number}]`: expected a pair of question and answer")
        question, answer = (_string(text, f"history[{number}]") for text in pair)
        turns += [Turn("user", question), Turn("assistant", answer)]
    question = _string(record["instruction"], "instruction")
    if extra := _string(record.get("input") or "", "input"):
        question = f"{question}\n{extra}"
    return [*turns, Turn("user", question), Turn("assistant", _string(record.get("output"), "output"))]


def _sharegpt(record: Mapping[str, Any]) -> list[Turn]:
    return _system(record) + _turns(record["conversations"], "conversations", "from", "value")


def _messages(record: Mapping[str, Any]) -> list[Turn]:
    return _turns(record["messages"], "messages", "role", "content")


def _system(record: Mapping[str, Any]) -> list[Turn]:
    text = _string(record.get("system") or "", "system")
    return [Turn("system", text)] if text else []


def _turns(entries: Any, key: str, role_key: str, content_key: str) -> list[Turn]:
    if not isinstance(entries, list):
        raise ValueError(f"`{key}`: expected a list of turns, got {type(entries).__name__}")
    turns = []
    for number, entry in enumerate(entries):
        place = f"{key}[{number}]"
        if not isinstance(entry, Mapping) or role_key not in entry or content_key not in entry:
            raise ValueError(f"`{place}`: expected `{role_key}` and `{content_key}`, got {_short(entry)}")
        role = _ROLES.get(entry[role_key]) if isinstance(entry[role_key], str) else None
        if role is None:
            raise ValueError(f"`{place}.{role_key}={entry[role_key]!r}`: expected one of {', '.join(_ROLES)}")
        turns.append(Turn(role, _content(entry[content_key], f"{place}.{content_key}")))
    return turns


def _content(value: Any, place: str) -> str:
    """A string, or OpenAI's list of parts, of which all must be text."""
    if isinstance(value, list):
        if all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
            return "".join(_string(part.get("text"), place) for part in value)
        raise ValueError(f"`{place}`: expected text, got parts that are not text")
    return _string(value, place)


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{place}`: expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        raise ValueError(f"`{place}` is not valid Unicode: {error.reason} at {error.start}") from error
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
