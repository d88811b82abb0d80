"""Records of preference: a prompt and two answers, one answer with a verdict, or answers with ratings.

* **pair**: `chosen` and `rejected` beside the prompt; each is a text, a message, or a list of messages that ends with
  the answer. Without a prompt both are whole conversations that differ in their last answer.
* **verdict** (KTO): `completion` and a `label` that is true or false beside the prompt; or a whole conversation with
  `label` or `kto_tag`, whose last answer is meant.
* **ratings**: `answers` beside the prompt, each with a text (`content`, `text`, `response`, `answer`) and a number
  (`rating`, `score`). The best and the worst make a pair.

The prompt is `prompt` (a text or messages), `messages`, `conversations`, or `instruction` with `input`, `system` and
`history`, as in the records of `records.py`, whose reading and whose refusals hold here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mixcn.errors import UserError

from .fields import check_record_keys, is_empty, shorten
from .records import KNOWN_ROLES, read_conversation
from .turns import Turn

PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction")
"""Keys of which a record has one, or none where its answers are whole conversations."""
_VERDICT_KEYS = ("label", "kto_tag")
_BESIDE = ("input", "system", "history")
PREFERENCE_KEYS = frozenset({*PROMPT_KEYS, *_BESIDE, *_VERDICT_KEYS, "chosen", "rejected", "completion", "answers"})
"""Keys that are read: those that `columns` may rename."""
_TEXT_KEYS = ("content", "text", "response", "answer", "value")
_RATING_KEYS = ("rating", "score", "overall_score")

CHOSEN, REJECTED, MISMATCHED = 1, -1, 0


class LoneVerdictError(UserError):
    """A file whose answers with a verdict are all to one prompt, so that none can be compared with another's."""


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """An answer to a prompt.

    Args:
        text: Its words.
        side: `CHOSEN` or `REJECTED`, or `MISMATCHED`: it answers another prompt, which KTO compares with.
    """

    text: str
    side: int


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and its answers.

    Args:
        prompt: Turns; the last one is the user's.
        answers: The chosen and the rejected one; or one with a verdict, followed by a mismatched one.
    """

    prompt: list[Turn]
    answers: tuple[JudgedAnswer, ...]


def read_preference(record: Mapping[str, Any], roles: Mapping[str, str] | None = None) -> Preference:
    """Read a record; one with a verdict has one answer yet, see `with_mismatched_answers`.

    Args:
        record: The record.
        roles: Meaning of further roles: ``user``, ``assistant`` or ``system``.

    Raises:
        ValueError: The record has another form, an answer that is empty, or two that are the same.
    """
    known = KNOWN_ROLES | dict(roles or {})
    check_record_keys(record)
    sides = _sides(record, known)
    found = [_conversation(record, answer, known) for answer, _ in sides]
    prompts = [turns[:-1] for turns in found]
    if any(prompt != prompts[0] for prompt in prompts):
        raise UserError("`chosen` and `rejected` answer different prompts. Give both the same turns before the answer")
    answers = tuple(JudgedAnswer(turns[-1].content, side) for turns, (_, side) in zip(found, sides, strict=True))
    names = (
        {CHOSEN: "chosen", REJECTED: "rejected"} if len(answers) == 2 else dict.fromkeys((CHOSEN, REJECTED), "judged")
    )
    for answer in answers:
        if not answer.text.strip():
            raise UserError(f"the {names[answer.side]} answer is empty. Write it, or remove the record")
    if len(answers) == 2 and answers[0].text.strip() == answers[1].text.strip():
        raise UserError(
            f"the chosen and the rejected answer are the same, {shorten(answers[0].text)}: nothing is preferred. "
            "Remove the record"
        )
    for number, turn in enumerate(prompts[0]):
        if turn.role != "system" and not turn.content.strip():
            raise UserError(f"turn {number} of the prompt, the {turn.role}'s, is empty. Write it, or remove the record")
    return Preference(prompts[0], answers)


def _sides(record: Mapping[str, Any], known: Mapping[str, str]) -> list[tuple[Any, int]]:
    """Return each answer as the record has it, and its side."""
    verdicts = [key for key in _VERDICT_KEYS if record.get(key) is not None]
    forms = {
        "`chosen` and `rejected`": not (is_empty(record.get("chosen")) and is_empty(record.get("rejected"))),
        "`answers`": not is_empty(record.get("answers")),
        f"`{verdicts[0] if verdicts else 'label'}`": bool(verdicts),
    }
    found = [form for form, is_there in forms.items() if is_there]
    if len(found) != 1:
        told = f"the record has {' and '.join(found)}" if found else f"its keys are {', '.join(map(repr, record))}"
        raise UserError(
            f"{told}: expected either `chosen` and `rejected`, or `completion` and `label`, or `answers` with ratings. "
            "Keep one form, or name the record's keys in the source's `columns`"
        )
    if forms["`chosen` and `rejected`"]:
        for key in ("chosen", "rejected"):
            if key not in record:
                raise UserError(f"no key `{key}` beside `{'rejected' if key == 'chosen' else 'chosen'}`. Give both")
        return [(record["chosen"], CHOSEN), (record["rejected"], REJECTED)]
    if forms["`answers`"]:
        return _rated(record["answers"])
    verdict = record[verdicts[0]]
    if not isinstance(verdict, bool):
        raise UserError(f"`{verdicts[0]}={shorten(verdict)}`: expected true or false")
    return [(record.get("completion"), CHOSEN if verdict else REJECTED)]


def _rated(answers: Any) -> list[tuple[Any, int]]:
    """Return the answer with the highest rating and the one with the lowest, the first of equals."""
    if not isinstance(answers, list) or len(answers) < 2:
        raise UserError(f"`answers`: expected a list of at least two, got {shorten(answers)}")
    rated = list[tuple[float, Any]]()
    for number, answer in enumerate(answers):
        entry = answer if isinstance(answer, Mapping) else {}
        rating = next((entry[key] for key in _RATING_KEYS if entry.get(key) is not None), None)
        text = next((entry[key] for key in _TEXT_KEYS if entry.get(key) is not None), None)
        if not isinstance(rating, int | float) or isinstance(rating, bool) or not isinstance(text, str):
            raise UserError(
                f"`answers[{number}]`: expected a text ({', '.join(_TEXT_KEYS[:4])}) and a number "
                f"({', '.join(_RATING_KEYS[:2])}), got {shorten(answer)}"
            )
        rated.append((float(rating), text))
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if not best[0] > worst[0]:
        raise UserError(f"all `answers` are rated {best[0]:g}: nothing is preferred. Remove the record")
    return [(best[1], CHOSEN), (worst[1], REJECTED)]


def _conversation(record: Mapping[str, Any], answer: Any, known: Mapping[str, str]) -> list[Turn]:
    """Read the prompt with one answer, as the form of conversations that it has."""
    before, text = _split_answer(answer, known)
    present = [key for key in PROMPT_KEYS if not is_empty(record.get(key))]
    if len(present) > 1:
        raise UserError(f"the record has {' and '.join(f'`{key}`' for key in present)}. Keep one of them as the prompt")
    shared = {key: record[key] for key in _BESIDE if not is_empty(record.get(key))}
    if not present:
        if text is None or not before:
            raise UserError("no prompt: expected `prompt`, `messages`, `conversations` or `instruction`")
        return read_conversation(shared | {"messages": [*before, {"role": "assistant", "content": text}]}, None, known)
    key = present[0]
    if before and not _repeats(record[key], before):
        raise UserError(f"turns before the answer are not those of `{key}`. Keep one of both")
    if key == "instruction":
        return read_conversation(shared | {key: record[key], "output": _given(text)}, "alpaca", known)
    prompt = record[key] if key != "prompt" or isinstance(record[key], list) else [_message("user", record[key])]
    if not isinstance(prompt, list):
        raise UserError(f"`{key}`: expected a text or a list of turns, got {shorten(prompt)}")
    # `completion` is missing where a verdict speaks of a conversation's last answer.
    last = [] if text is None else [_message("assistant", text)]
    return read_conversation(shared | {"messages": [*prompt, *last]}, "messages", known)


def _message(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def _given(text: str | None) -> str:
    if text is None:
        raise UserError("`label` beside `instruction`: expected the answer in `completion`")
    return text


def _repeats(prompt: Any, before: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a side's own turns say the prompt once more, as data sets in TRL's layout do."""
    if isinstance(prompt, str):
        users = [
            turn for turn in before if _text_of(turn) is not None and turn.get("role", turn.get("from")) != "system"
        ]
        return len(users) == 1 and _text_of(users[0]) == prompt
    return isinstance(prompt, list) and list(before) == prompt


def _text_of(turn: Mapping[str, Any]) -> Any:
    return turn.get("content", turn.get("value"))


def _split_answer(answer: Any, known: Mapping[str, str]) -> tuple[list[Mapping[str, Any]], str | None]:
    """Return the turns before an answer and its text: of a text, a message, or a list of messages; None of null."""
    if answer is None or isinstance(answer, str):
        return [], answer
    turns = answer if isinstance(answer, list) else [answer]
    last = turns[-1] if turns else None
    if not isinstance(last, Mapping) or not isinstance(text := _text_of(last), str):
        raise UserError(f"an answer is {shorten(answer)}: expected a text, a message, or a list of messages")
    if known.get(str(last.get("role", last.get("from", "assistant")))) != "assistant":
        raise UserError(f"an answer's last message is {shorten(last)}: expected one of the assistant")
    return list(turns[:-1]), text


def with_mismatched_answers(preferences: Iterator[tuple[int, Preference]]) -> Iterator[tuple[int, Preference]]:
    """Give each answer with a verdict the last answer before it to another prompt; the first ones that of the next.

    KTO measures with these how far the model is from its reference on answers that do not belong to the prompt.

    Args:
        preferences: Line or row, and record.

    Yields:
        The same; pairs as they came.

    Raises:
        LoneVerdictError: There are records with a verdict, and all are of one prompt.
    """
    waiting = list[tuple[int, Preference]]()  # of the first prompt, until there is another
    last: Preference | None = None
    other: str | None = None  # the last answer to another prompt than that of `last`
    for number, preference in preferences:
        if len(preference.answers) > 1:
            yield number, preference
            continue
        if last is not None and preference.prompt != last.prompt:
            other = last.answers[0].text
            yield from ((line, _with_mismatched(first, preference.answers[0].text)) for line, first in waiting)
            waiting = []
        last = preference
        if other is None:
            waiting.append((number, preference))
        else:
            yield number, _with_mismatched(preference, other)
    if waiting:
        raise LoneVerdictError(
            "answers with a verdict to one prompt alone: KTO compares with answers to another prompt. Give two or more"
        )


def _with_mismatched(preference: Preference, other: str) -> Preference:
    return Preference(preference.prompt, (*preference.answers, JudgedAnswer(other, MISMATCHED)))


def dump_preference(preference: Preference) -> bytes:
    """Write a preference as UTF-8, the same for every form it was read from."""
    prompt = [[turn.role, turn.content] for turn in preference.prompt]
    answers = [[answer.text, answer.side] for answer in preference.answers]
    return json.dumps([prompt, answers], ensure_ascii=False).encode()


def load_preference(text: str) -> Preference:
    """Read what `dump_preference` wrote."""
    prompt, answers = json.loads(text)
    return Preference([Turn(*turn) for turn in prompt], tuple(JudgedAnswer(*answer) for answer in answers))
