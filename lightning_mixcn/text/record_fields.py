"""Keys of conversation records and of their turns: which are obeyed, which are refused by name, which are metadata.

A key that is silently ignored changes what a model learns, so a turn may have only the keys named here. A record may
have others, such as ``id`` or ``source``, which are metadata and not read; those in `REFUSED_KEYS` are known to change
what is learned and are refused unless they are empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Say whether an answer is learned: OpenAI and mistral-finetune, axolotl, ms-swift.
FLAG_KEYS = ("weight", "train", "loss")
# TRL's and LLaMA-Factory's preference flags speak of the whole record.
RECORD_FLAG_KEYS = (*FLAG_KEYS, "label", "kto_tag")
_TURN_METADATA = frozenset({"id", "timestamp", "created_at", "lang", "language", "model", "token_count"})

_TOOLS = dict.fromkeys(
    ("tools", "functions", "tool_calls", "tool_choice", "function_call", "function_calls"), "no template writes tools"
)
_MEDIA = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio", "objects"), "only text can be learned from"
)
_REASONING = dict.fromkeys(
    ("reasoning", "reasoning_content", "thinking", "thought", "thoughts"), "no template writes it"
)
_MASKS = dict.fromkeys(
    ("train_detail", "training_detail", "loss_scale", "loss_mask", "assistant_masks"), "an answer is learned whole"
)
_PROMPT = {
    "documents": "no template writes documents",
    "chat_template": "the template is the data module's",
    "chat_template_kwargs": "templates get no other arguments",
    "system_prompt": "the system prompt is read from `system`, say `columns: {system: system_prompt}` in the source",
}
REFUSED_KEYS: dict[str, str] = _TOOLS | _MEDIA | _REASONING | _MASKS | _PROMPT
"""Keys of records that change what is learned, and why they are refused."""


def check_record_keys(record: Mapping[str, Any]) -> None:
    """Raise if a record has something that changes what is learned and that cannot be rendered.

    Args:
        record: The record; empty values (null, false, ``""``, ``[]``, ``{}``) count as absent.

    Raises:
        ValueError: It names the key, why it is refused, and what to do.
    """
    for key, reason in REFUSED_KEYS.items():
        if not is_empty(record.get(key)):
            raise ValueError(f"`{key}={shorten(record[key])}`: {reason}. Write it into the text, or remove it")


def check_turn_keys(turn: Mapping[str, Any], known: tuple[str, str], place: str) -> None:
    """Raise if a turn has other keys than role, content, flags and known metadata.

    Args:
        turn: The turn; empty values count as absent.
        known: Its keys of role and content.
        place: What errors call it, such as ``messages[1]``.

    Raises:
        ValueError: It names the keys, and those that a turn may have.
    """
    allowed = {*known, *FLAG_KEYS, *_TURN_METADATA}
    unknown = [key for key, value in turn.items() if key not in allowed and not is_empty(value)]
    if unknown:
        raise ValueError(
            f"`{place}` has {', '.join(f'`{key}={shorten(turn[key])}`' for key in unknown)}: a turn may have only "
            f"{', '.join((*known, *FLAG_KEYS))}. Write it into the text, or remove the key"
        )


def is_learned(entry: Mapping[str, Any], keys: tuple[str, ...], place: str) -> bool | None:
    """Read the flags that say whether something is learned.

    Args:
        entry: A turn or a record.
        keys: The flags that it may have.
        place: What errors call it; empty for a record.

    Returns:
        What the flags say, or None if there are none.

    Raises:
        ValueError: A flag is neither 0, 1, false nor true, or two contradict each other.
    """
    named = {key: entry[key] for key in keys if entry.get(key) is not None}
    for key, value in named.items():
        # A string "false" or a weight of 0.5 cannot be obeyed by a mask.
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(
                f"`{f'{place}.' if place else ''}{key}={shorten(value)}`: expected 1 or true (learned), or 0 or false "
                "(not learned). Set one of these, or remove the key"
            )
    said = {bool(value) for value in named.values()}
    if len(said) > 1:
        pairs = " and ".join(f"`{key}={value!r}`" for key, value in named.items())
        raise ValueError(f"{f'`{place}`: ' if place else ''}{pairs} contradict each other. Keep one")
    return said.pop() if said else None


def is_empty(value: Any) -> bool:
    """Whether a value says nothing; a table gives every row the keys, and every struct the fields, that one row has."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")  # lists of tools are often written as JSON in a string
    if isinstance(value, Mapping):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(part) for part in value)
    return value is None or value is False


def shorten(value: Any) -> str:
    """Write a value for an error, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
