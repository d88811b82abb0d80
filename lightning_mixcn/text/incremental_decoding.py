"""Text from tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character, or not yet


def stream_text(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Decode tokens as they come, never half a character.

    A character may take several tokens. While the text ends in bytes that are none, the rest waits; at the end it
    comes as it is.

    Args:
        tokens: Token ids.
        decode: All ids so far to text.

    Yields:
        Pieces, none empty; joined, they are the text without blanks before its first letter, with which models that
        were not asked to begin an answer.
    """
    ids: list[int] = []
    given, text = 0, ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        start = max(given, len(text) - len(text.lstrip()))
        if start < len(text) and not text.endswith(_BROKEN):
            yield text[start:]
            given = len(text)
    if rest := text[given:] if given else text.lstrip():
        yield rest
