"""Questions that several models are to answer, read from a file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.text import Turn
from lightning_mixcn.text.chat.records import read_conversation
from lightning_mixcn.text.chat.turns import check_prompt

_EXPECTED = "a `question`, `messages` that end with the user's turn, or a conversation, whose last answer is left out"


def read_questions(path: str) -> list[list[Turn]]:
    """Read a file of questions.

    Args:
        path: ``.jsonl`` or ``.json`` (an array): objects with ``question`` and perhaps ``system``, or ``messages``
            (role and content) up to the user's last turn, or training conversations of any known form, whose last
            answer is left out. Anything else is text, one question a line.

    Returns:
        The turns of each question, the last one the user's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no question, is not UTF-8 or not JSON, or a record asks nothing; the line is named.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingFileError(f"`questions={path!r}` is no file. Give text, one question a line, or JSON Lines")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise UserError(f"`questions={path!r}` is not UTF-8 ({error}). Convert it first") from error
    questions = []
    for place, record in _records(file, content):
        try:
            turns = [Turn("user", record)] if isinstance(record, str) else _turns(record)
            check_prompt(turns)
            if not turns[-1].content.strip():
                raise UserError("the question is empty")
            "".join(turn.content for turn in turns).encode()  # JSON can spell half a character
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"`questions={path!r}` {place}: {error}. Expected {_EXPECTED}") from error
        questions.append(turns)
    if not questions:
        raise UserError(f"`questions={path!r}` has no question. Write one a line")
    return questions


def shown(turns: list[Turn]) -> str:
    """Return a question as a judge reads it: alone, or with what was said before it."""
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"[{turn.role}] {turn.content}" for turn in turns)


def _records(file: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Yield where each record is, and what it says."""
    if file.suffix == ".json":
        try:
            records = json.loads(content)
        except ValueError as error:
            raise UserError(f"`questions={str(file)!r}` is not JSON ({error}). Mend it") from error
        if not isinstance(records, list):
            raise UserError(f"`questions={str(file)!r}` holds no array. For one record a line, name it .jsonl")
        yield from ((f"record {number}", record) for number, record in enumerate(records, 1))
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield f"line {number}", line.strip()
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise UserError(f"`questions={str(file)!r}` line {number} is not JSON ({error}). Mend the line") from error


def _turns(record: Any) -> list[Turn]:
    if not isinstance(record, Mapping):
        raise UserError(f"got a {type(record).__name__}")
    if "question" in record:
        system = record.get("system") or ""
        if not (isinstance(record["question"], str) and isinstance(system, str)):
            raise UserError("`question` and `system` are to be text")
        return [*([Turn("system", system)] if system else []), Turn("user", record["question"])]
    messages = record.get("messages")
    if isinstance(messages, list) and messages and messages[-1]["role"] == "user":
        return [Turn(str(message["role"]), str(message["content"])) for message in messages]
    return read_conversation({key: value for key, value in record.items() if value is not None})[:-1]
