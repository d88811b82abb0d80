"""Filled-in sheets as pairs to train on: the answer that most judges prefer beside the other one.

Legend: J judges.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import MissingFileError, UserError

from .matches import LEFT, MISSING, RIGHT, TIE, Matches
from .sheet import Item

ANSWERS = "answers.jsonl"
_SIDES = {LEFT: "left", RIGHT: "right"}


class AnswerFile:
    """What models answered, of the folder of `mixcn preference sheet`.

    Args:
        path: Its ``answers.jsonl``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not what `mixcn preference sheet` writes, or an answer is there twice; the line is named.
    """

    def __init__(self, path: Path) -> None:
        """Read them."""
        if not path.is_file():
            raise MissingFileError(
                f"{str(path)!r} is no file. It is in the folder of `mixcn preference sheet`, beside the key"
            )
        self.path, self._lines = path, dict[tuple[str, int], tuple[int, str, list[dict[str, str]]]]()
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            key, text, messages = self._read(number, line)
            if key in self._lines:
                before = self._lines[key][0]
                raise UserError(
                    f"{str(path)!r} lines {before} and {number} both answer question {key[1]} as {key[0]!r}. "
                    "Remove one of them"
                )
            self._lines[key] = (number, text, messages)

    def answer(self, model: str, question: int) -> tuple[str, list[dict[str, str]]]:
        """Return an answer's text and the messages that it answers. Raises: ValueError: it is not there."""
        if (model, question) not in self._lines:
            raise UserError(
                f"{str(self.path)!r} has no answer of {model!r} to question {question}, which the key names. "
                "Restore the folder of `mixcn preference sheet`"
            )
        return self._lines[model, question][1:]

    def _read(self, number: int, line: bytes) -> tuple[tuple[str, int], str, list[dict[str, str]]]:
        try:
            content = json.loads(line)
            messages = [{key: message[key] for key in ("role", "content")} for message in content["messages"]]
            values = (content["model"], content["text"], *(text for message in messages for text in message.values()))
            if not messages or not all(isinstance(value, str) for value in values):
                raise TypeError("a text is none")
            return (content["model"], int(content["number"])), content["text"], messages
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{str(self.path)!r} line {number}: expected `model`, `number`, `messages` and `text`, as "
                f"`mixcn preference sheet` writes them ({error!r}). Write the sheet again, or restore the file"
            ) from error


def preferred_pairs(matches: Matches, answers: AnswerFile) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return a record of each item of which more than half of the verdicts are for the same side.

    Args:
        matches: The verdicts.
        answers: The answers.

    Returns:
        Records with ``prompt``, ``chosen``, ``rejected``, ``chosen_model``, ``rejected_model``, ``item`` and
        ``judges`` (the verdict of each one that gave one: chosen, rejected or tie); and the number of items that were
        left out, by why.
    """
    records, left_out = list[dict[str, Any]](), Counter[str]()
    for place, item in enumerate(matches.items):
        verdicts = {
            judge: int(verdict)
            for judge, verdict in zip(matches.judges, matches.verdicts[:, place], strict=True)
            if verdict != MISSING
        }
        side = majority(verdicts.values())
        if side is None:
            is_tie = bool(verdicts) and set(verdicts.values()) == {TIE}
            left_out["ties" if is_tie else "without a majority" if verdicts else "without a verdict"] += 1
            continue
        record = _record(matches, answers, item, side) | {
            "judges": {
                judge: "tie" if verdict == TIE else "chosen" if verdict == side else "rejected"
                for judge, verdict in verdicts.items()
            }
        }
        texts = [record[name].strip() for name in ("chosen", "rejected")]
        if not all(texts):
            left_out["with an empty answer"] += 1
        elif texts[0] == texts[1]:
            left_out["with equal answers"] += 1
        else:
            records.append(record)
    return records, dict(left_out)


def majority(verdicts: Any) -> int | None:
    """Return the side, `LEFT` or `RIGHT`, that more than half of the verdicts are for; None if there is none."""
    counts = Counter(verdicts)
    return next((side for side in _SIDES if 2 * counts[side] > counts.total()), None)


def jsonl(records: list[dict[str, Any]]) -> Iterator[str]:
    """Give each record as a line."""
    return (json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _record(matches: Matches, answers: AnswerFile, item: Item, side: int) -> dict[str, Any]:
    models = {LEFT: item.left, RIGHT: item.right}
    chosen, rejected = (matches.models[models[one]] for one in (side, RIGHT if side == LEFT else LEFT))
    (better, prompt), (worse, other) = (answers.answer(model, item.question) for model in (chosen, rejected))
    if prompt != other:
        raise UserError(
            f"{str(answers.path)!r}: {chosen!r} and {rejected!r} were not asked the same as question {item.question}. "
            "Restore the folder of `mixcn preference sheet`"
        )
    return {
        "prompt": prompt, "chosen": better, "rejected": worse, "chosen_model": chosen, "rejected_model": rejected,
        "item": item.name,
    }  # fmt: skip


def told(records: list[dict[str, Any]], left_out: Mapping[str, int]) -> str:
    """Say in a line how many pairs there are, and what was left out."""
    parts = [f"{count} {why}" for why, count in sorted(left_out.items())]
    return f"{len(records)} pairs" + (f"; left out: {', '.join(parts)}" if parts else "")
