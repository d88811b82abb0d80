"""Keys of conversation records and of their turns: which are obeyed, which are refused by name, which are metadata.

A key that is silently ignored changes what a model learns, so a turn may have only the keys named here. A record may
have others, such as ``id`` or ``source``, which are metadata and not read. Refused unless they are empty are those in
`REFUSED_KEYS`, and texts that only another form of records has (`check_other_texts`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_mixcn.errors import UserError

if TYPE_CHECKING:
    from .turns import Turn

# Say whether an answer is learned: OpenAI and mistral-finetune, axolotl, ms-swift, and TRL's name of it.
FLAG_KEYS = ("weight", "train", "loss", "label")
# LLaMA-Factory's preference flag speaks of the whole record.
RECORD_FLAG_KEYS = (*FLAG_KEYS, "kto_tag")
_TURN_METADATA = frozenset({"id", "timestamp", "created_at", "lang", "language", "model", "token_count"})

_TOOLS = dict.fromkeys(
    ("tools", "functions", "tool_calls", "tool_choice", "function_call", "function_calls"), "no template writes tools"
)
_MEDIA = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio", "objects"), "only text can be learned from"
)
_REASONING = dict.fromkeys(
    ("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "cot", "chain_of_thought", "rationale"),
    "no template writes it",
)
_LEARN = {
    key: f"to have it obeyed as a flag of the record, say `columns: {{train: {key}}}` in the source"
    for key in ("learn", "learned", "trainable", "is_learned")
}
_MASKS = dict.fromkeys(
    ("train_detail", "training_detail", "loss_scale", "loss_weight", "loss_mask", "mask", "label_mask", "train_mask",
     "assistant_masks", "completion_mask"),
    "an answer is learned whole",
)  # fmt: skip
# If they are false, they say what is done anyway.
_SWITCHES = dict.fromkeys(
    ("train_on_input", "train_on_inputs", "train_on_prompt", "ignore", "skip"),
    "answers of all records are learned, and only answers",
)
_PROMPT = {
    "documents": "no template writes documents",
    "chat_template": "the template is the data module's",
    "chat_template_kwargs": "templates get no other arguments",
}
REFUSED_KEYS: dict[str, str] = _TOOLS | _MEDIA | _REASONING | _LEARN | _MASKS | _SWITCHES | _PROMPT
"""Keys of records that change what is learned, and why they are refused."""

_SYSTEM_KEYS = (
    "system_prompt", "system_message", "system_instruction", "sys_prompt", "meta_instruction", "meta_prompt",
)  # fmt: skip
# In the order in which `suggest_columns` takes them: `input` is the question only if nothing else is.
_QUESTION_KEYS = ("instruction", "question", "query", "problem", "prompt", "input", "context")
_ANSWER_KEYS = ("output", "response", "answer", "completion", "target", "solution", "chosen", "rejected")
_TURNS_KEYS = ("conversation", "dialog", "dialogue", "chat")
TEXT_KEYS = frozenset({*_SYSTEM_KEYS, *_QUESTION_KEYS, *_ANSWER_KEYS, *_TURNS_KEYS})
"""Keys under which some form of records keeps the system prompt, a question, an answer, or the turns."""
# Data sets often repeat a turn under these, as UltraChat does with `prompt`.
_REPEATING_KEYS = TEXT_KEYS - {"instruction", "input", "output", "context", *_TURNS_KEYS}


def check_record_keys(record: Mapping[str, Any]) -> None:
    """Raise if a record has something that changes what is learned and that cannot be rendered.

    Args:
        record: The record; empty values (null, ``""``, ``[]``, ``{}``) count as absent.

    Raises:
        ValueError: It names the key, why it is refused, and what to do.
    """
    for key, reason in REFUSED_KEYS.items():
        value = record.get(key)
        if not (_is_absent(key, value) or (value is False and key in _SWITCHES)):
            raise UserError(f"`{key}={shorten(value)}`: {reason}. Write it into the text, or remove it")


def check_other_texts(
    record: Mapping[str, Any], turns: Sequence[Turn], read: Collection[str], form: str, is_stated: bool
) -> None:
    """Raise if a record has text that its form does not read and that is not the text of a turn either.

    Args:
        record: The record; empty values count as absent.
        turns: Its turns.
        read: The keys that its form reads; the first one tells it.
        form: Its form.
        is_stated: True if the source states the form, so that the text of another form is metadata.

    Raises:
        ValueError: It names the key and what to do.
    """
    main = next(iter(read))
    for key in (key for key in record if key in TEXT_KEYS and key not in read and not is_empty(record[key])):
        if key in _REPEATING_KEYS and _is_repeated(key, record[key], turns):
            continue
        name = _read_as(key, main)
        rename = f"Say `columns: {{{name}: {key}}}` in the source if it is that, " if name else ""
        if key in _SYSTEM_KEYS:
            raise UserError(
                f"`{key}={shorten(record[key])}`: the system prompt is read from `system`. {rename}or drop it"
            )
        if not is_stated:
            leave = f"{'s' if name else 'S'}tate `records: {form}` to leave it out, or drop it"
            raise UserError(f"`{key}={shorten(record[key])}` is not read beside `{main}`. {rename}{leave}")


def suggest_columns(record: Mapping[str, Any]) -> str:
    """Write the `columns` with which a record of no known form can be read; an example if none fit."""
    present = [key for key, value in record.items() if not is_empty(value)]
    turns, system, question, answer = (
        next((key for key in keys if key in present), None)
        for keys in (_TURNS_KEYS, _SYSTEM_KEYS, _QUESTION_KEYS[:-1], _ANSWER_KEYS[:-1])
    )
    if turns:
        columns = {"messages": turns}
    elif question and answer:
        columns = {"instruction": question, "output": answer}
        if "context" in present and "input" not in present:
            columns["input"] = "context"
    else:
        return "such as `columns: {instruction: input, output: target}`"
    if system:
        columns["system"] = system
    renamed = [f"{name}: {key}" for name, key in sorted(columns.items()) if name != key]
    return f"here `columns: {{{', '.join(renamed)}}}`"


def check_turn_keys(turn: Mapping[str, Any], known: tuple[str, str], place: str) -> None:
    """Raise if a turn has other keys than role, content, flags and known metadata.

    Args:
        turn: The turn; empty values count as absent, and false where no flag says whether it is learned.
        known: Its keys of role and content.
        place: Its name in errors, such as ``messages[1]``.

    Raises:
        ValueError: It names the keys, and those that a turn may have.
    """
    allowed = {*known, *FLAG_KEYS, *_TURN_METADATA}
    unknown = [key for key, value in turn.items() if key not in allowed and not _is_absent(key, value)]
    if unknown:
        raise UserError(
            f"`{place}` has {', '.join(f'`{key}={shorten(turn[key])}`' for key in unknown)}: a turn may have only "
            f"{', '.join((*known, *FLAG_KEYS))}. Write it into the text, or remove the key"
        )


def is_learned(entry: Mapping[str, Any], keys: tuple[str, ...], place: str) -> bool | None:
    """Read the flags that say whether something is learned.

    Args:
        entry: A turn or a record.
        keys: The flags that it may have.
        place: Its name in errors; empty for a record.

    Returns:
        True (learned), False (not learned), or None if it has no flag.

    Raises:
        ValueError: A flag is neither 0, 1, false nor true, or two contradict each other.
    """
    named = {key: entry[key] for key in keys if entry.get(key) is not None}
    for key, value in named.items():
        # A string "false" or a weight of 0.5 cannot be obeyed by a mask.
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise UserError(
                f"`{f'{place}.' if place else ''}{key}={shorten(value)}`: expected 1 or true (learned), or 0 or false "
                "(not learned). Set one of these, or remove the key"
            )
    said = {bool(value) for value in named.values()}
    if len(said) > 1:
        pairs = " and ".join(f"`{key}={value!r}`" for key, value in named.items())
        raise UserError(f"{f'`{place}`: ' if place else ''}{pairs} contradict each other. Keep one")
    return said.pop() if said else None


def is_empty(value: Any) -> bool:
    """Tell a value that says nothing; false is none, since it may be a flag.

    A table gives every row the keys, and every struct the fields, that one row has, so structs of nulls are empty, too.
    """
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")  # lists of tools are often written as JSON in a string
    if isinstance(value, Mapping):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(part) for part in value)
    return value is None


def shorten(value: Any) -> str:
    """Write a value for an error, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_absent(key: str, value: Any) -> bool:
    """Tell a value that is as good as none: without tools, media or reasoning, false says that there are none."""
    return is_empty(value) or (value is False and key in _TOOLS | _MEDIA | _REASONING)


def _is_repeated(key: str, value: Any, turns: Sequence[Turn]) -> bool:
    """Tell the text of the turn that the key is the name of: the system's, the first one's, or the last answer's."""
    if not isinstance(value, str):
        return False
    questions = [turn.content for turn in turns if turn.role == "user"]
    if key in _ANSWER_KEYS:
        places = [turn.content for turn in turns if turn.role == "assistant"][-1:]
    elif key in _SYSTEM_KEYS:
        places = [turn.content for turn in turns if turn.role == "system"]
    else:
        places = [*[turn.content for turn in turns[:1]], *questions[:1]]
    return value.strip() in [content.strip() for content in places]


def _read_as(key: str, main: str) -> str | None:
    """Choose the key that the source's `columns` may give another one's value to, in a form that `main` tells."""
    if key in _SYSTEM_KEYS:
        return "system"
    if key in _TURNS_KEYS:
        return main if main != "instruction" else "messages"
    if main == "instruction":
        return "output" if key in _ANSWER_KEYS else "instruction"
    return None if key in _ANSWER_KEYS else "system"
