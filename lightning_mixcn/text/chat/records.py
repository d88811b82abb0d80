"""Conversations, and the forms of records in which people keep them.

* ``alpaca``: ``instruction``, ``output``, perhaps ``input``, ``system``, ``history`` (pairs of question and answer);
* ``sharegpt``: ``conversations``, a list of ``from`` and ``value``, and perhaps ``system``;
* ``messages``: ``messages``, a list of ``role`` and ``content``, as in OpenAI's interface, and perhaps ``system``.

Either list may have turns of ``from`` and ``value``, of ``role`` and ``content``, or pairs such as ``human`` and
``assistant``. Other keys: see `fields.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_mixcn.errors import UserError

from .fields import (
    FLAG_KEYS,
    RECORD_FLAG_KEYS,
    REFUSED_KEYS,
    TEXT_KEYS,
    check_other_texts,
    check_record_keys,
    check_turn_keys,
    is_empty,
    is_learned,
    shorten,
    suggest_columns,
)
from .turns import Turn, check_turns

RecordFormat = Literal["alpaca", "sharegpt", "messages"]

# The key that tells each form.
_TELLING_KEYS: dict[RecordFormat, str] = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
}
# The keys that each form reads, the telling one first.
_READ_KEYS: dict[RecordFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output", "context"),  # `_alpaca` refuses a context itself
}
# The keys that some form reads, and those that are looked at: the rest is metadata.
OBEYED_KEYS = frozenset({*_TELLING_KEYS.values(), "input", "output", "system", "history", *RECORD_FLAG_KEYS})
RECORD_KEYS = OBEYED_KEYS | REFUSED_KEYS.keys() | TEXT_KEYS
KNOWN_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Meaning of the roles of records."""


class EmptyTurnError(UserError):
    """A record with an empty question or answer: nothing that could be learned, and no damage either."""


def read_conversation(
    record: Mapping[str, Any], form: RecordFormat | None = None, roles: Mapping[str, str] | None = None
) -> list[Turn]:
    """Read a record as a conversation.

    Args:
        record: The record.
        form: Its form, which alone is then read; None tells it from the record's keys.
        roles: Meaning of further roles: ``user``, ``assistant`` or ``system``.

    Returns:
        The turns: perhaps one of the system, then user and assistant in turn; the last one is the assistant's.

    Raises:
        ValueError: The record has another form, is no conversation, or has keys that cannot be obeyed.
    """
    stated, form = form, form or _form_of(record)
    if _TELLING_KEYS[form] not in record:
        raise UserError(f"no key {_TELLING_KEYS[form]!r}, which {form} records have; {_keys(record)}")
    check_record_keys(record)
    known = KNOWN_ROLES | dict(roles or {})
    turns = _alpaca(record) if form == "alpaca" else _listed(record, form, known)
    check_other_texts(record, turns, _READ_KEYS[form], form, is_stated=stated is not None)
    check_turns(turns)
    if turns[-1].role != "assistant":
        raise UserError("the last turn is the user's, so there is no answer to learn from. Remove that turn")
    return turns


def read_training_conversation(
    record: Mapping[str, Any], form: RecordFormat | None = None, roles: Mapping[str, str] | None = None
) -> list[Turn]:
    """Read a record as a conversation with at least one answer to learn.

    Args:
        record: The record.
        form: Its form; None tells it from the record's keys.
        roles: Meaning of further roles.

    Returns:
        The turns, as `read_conversation` gives them.

    Raises:
        EmptyTurnError: A question or an answer is empty or white space.
        ValueError: See `read_conversation`; or a flag says that no answer of the record is to be learned.
    """
    turns = read_conversation(record, form, roles)
    if is_learned(record, RECORD_FLAG_KEYS, "") is False:
        flags = ", ".join(f"`{key}={record[key]!r}`" for key in RECORD_FLAG_KEYS if record.get(key) is not None)
        raise UserError(
            f"{flags} says that this record is not to be learned. Remove it, or leave such records out with "
            "`on_bad_record: skip`"
        )
    for number, turn in enumerate(turns):
        if turn.role != "system" and not turn.content.strip():
            raise EmptyTurnError(f"turn {number}, the {turn.role}'s, is empty. Write its text, or remove the record")
    if not any(turn.learned for turn in turns if turn.role == "assistant"):
        raise UserError(
            "every answer is flagged as not to be learned. Remove the record, or leave such records out with "
            "`on_bad_record: skip`"
        )
    return turns


def dump_conversation(turns: Sequence[Turn]) -> bytes:
    """Write a conversation as UTF-8, the same for every form it was read from."""
    entries = [[turn.role, turn.content, *([] if turn.learned else [False])] for turn in turns]
    return json.dumps(entries, ensure_ascii=False).encode()


def load_conversation(text: str) -> list[Turn]:
    """Read what `dump_conversation` wrote."""
    return [Turn(*entry) for entry in json.loads(text)]


def _form_of(record: Mapping[str, Any]) -> RecordFormat:
    found = [form for form, key in _TELLING_KEYS.items() if key in record and (form != "alpaca" or "output" in record)]
    if not found:
        raise UserError(
            "expected `messages`, `conversations`, or `instruction` and `output`; "
            f"{_keys(record)}. Convert the records to one of these forms, or say in the source which key is which, "
            f"{suggest_columns(record)}"
        )
    if len(found) > 1:
        # Converted sets keep the other form's keys without a value.
        found = [form for form in found if not all(is_empty(record.get(key)) for key in _READ_KEYS[form])] or found[:1]
    if len(found) > 1:
        raise UserError(
            f"the record has the keys of {' and '.join(found)}. Set the source's `records` to the form to be read"
        )
    return found[0]


def _keys(record: Mapping[str, Any]) -> str:
    return f"its keys are {', '.join(map(repr, record))}" if record else "it has no keys"


def _alpaca(record: Mapping[str, Any]) -> list[Turn]:
    if not is_empty(record.get("context")):
        raise UserError("alpaca records have no `context`. Say `columns: {input: context}` in the source, or drop it")
    turns = _system(record)
    history = record.get("history")
    if history is not None and not isinstance(history, (list, tuple)):
        raise UserError(f"`history`: expected a list of pairs of question and answer, got {shorten(history)}")
    for number, pair in enumerate(history or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"`history[{number}]`: expected a pair of question and answer, got {shorten(pair)}")
        question, answer = (_string(text, f"history[{number}]") for text in pair)
        turns += [Turn("user", question), Turn("assistant", answer)]
    instruction, extra = _string(record["instruction"], "instruction"), _optional(record, "input")
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    return [*turns, Turn("user", question), Turn("assistant", _string(record.get("output"), "output"))]


def _listed(record: Mapping[str, Any], form: RecordFormat, known: Mapping[str, str]) -> list[Turn]:
    """Read a record whose turns are in a list."""
    key = _TELLING_KEYS[form]
    if not is_empty(record.get("history")):
        raise UserError(f"`history` beside `{key}` is not read. Put its turns in front of those of `{key}`")
    system = _system(record)
    # An empty system prompt says nothing, and many templates refuse it.
    turns = [turn for turn in _turns(record[key], form, known) if turn.role != "system" or turn.content.strip()]
    if system and any(turn.role == "system" for turn in turns):
        raise UserError(f"the record has `system` and `{key}` a system turn. Keep one of them")
    return system + turns


def _system(record: Mapping[str, Any]) -> list[Turn]:
    text = _optional(record, "system")
    return [Turn("system", text)] if text.strip() else []


def _turns(entries: Any, form: RecordFormat, known: Mapping[str, str]) -> list[Turn]:
    key = _TELLING_KEYS[form]
    own, other = ("role", "content"), ("from", "value")
    if form == "sharegpt":
        own, other = other, own
    if not isinstance(entries, list):
        raise UserError(f"`{key}`: expected a list of turns, got {type(entries).__name__}")
    turns: list[Turn] = []
    for number, entry in enumerate(entries):
        place = f"{key}[{number}]"
        # A table gives every turn the fields that one turn has.
        present = {name: value for name, value in entry.items() if value is not None} if _is_object(entry) else {}
        names = next((pair for pair in (own, other) if pair[0] in present), own)
        if present and all(name in known for name in present):
            turns += _pair(present, place, known)
            continue
        check_turn_keys(present, names, place)
        if known.get(str(present.get(names[0]))) == "system" and names[1] in entry:
            present.setdefault(names[1], "")  # null, as a table writes it
        if not all(name in present for name in names):
            raise UserError(f"`{place}`: expected `{own[0]}` and `{own[1]}`, got {shorten(entry)}")
        turns.append(_turn(present, names, place, known))
    return turns


def _is_object(entry: Any) -> bool:
    return isinstance(entry, Mapping)


def _turn(entry: Mapping[str, Any], names: tuple[str, str], place: str, known: Mapping[str, str]) -> Turn:
    role_key, content_key = names
    named = entry[role_key]
    role = known.get(named) if isinstance(named, str) else None
    if role is None:
        raise UserError(
            f"`{place}.{role_key}={named!r}`: expected one of {', '.join(known)}. Say what another role means in the "
            "source's `roles`, such as `roles: {tool: user}`"
        )
    content, learned = _content(entry[content_key], f"{place}.{content_key}"), is_learned(entry, FLAG_KEYS, place)
    if role == "assistant":
        return Turn(role, content, learned is not False)
    if learned:
        raise UserError(f"`{place}` is flagged as to be learned, but only the assistant's turns are. Remove the flag")
    return Turn(role, content)


def _pair(entry: Mapping[str, Any], place: str, known: Mapping[str, str]) -> list[Turn]:
    """Read an exchange whose keys are its roles; a table may have them in any order."""
    turns = [Turn(known[name], _content(value, f"{place}.{name}")) for name, value in entry.items()]
    return sorted(turns, key=lambda turn: ("system", "user", "assistant").index(turn.role))


def _content(value: Any, place: str) -> str:
    """Read a string, or OpenAI's list of parts, of which all must be text; they are joined as templates do."""
    if not isinstance(value, list):
        return _string(value, place)
    texts = []
    for number, part in enumerate(value):
        present = {key: item for key, item in part.items() if not is_empty(item)} if _is_object(part) else {}
        if present.get("type") != "text" or not present.keys() <= {"type", "text"}:
            raise UserError(f"`{place}[{number}]`: expected a part of type text and nothing else, got {shorten(part)}")
        texts.append(_string(part.get("text"), f"{place}[{number}].text"))
    return "".join(texts)


def _optional(record: Mapping[str, Any], key: str) -> str:
    return "" if record.get(key) is None else _string(record[key], key)


def _string(value: Any, place: str) -> str:
    """Require text: a number is not written out, since nobody knows how (1.0, 1e3, True)."""
    if not isinstance(value, str):
        raise UserError(f"`{place}`: expected a string, got {type(value).__name__} {shorten(value)}. Write it as text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        raise UserError(f"`{place}` is not valid Unicode: {error.reason} at {error.start}") from error
    return value
