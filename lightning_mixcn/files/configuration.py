"""Read YAML that a person wrote: refuse at once what a loader takes silently, hangs on, or ends in a traceback with."""

from pathlib import Path

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    ScalarEvent,
)

from lightning_mixcn.errors import UserError, one_line

MOST_BYTES = 2**24
_MOST_VALUES, _DEEPEST = 200_000, 64


def read_configuration(path: Path, argument: str) -> str:
    """Return the text of a YAML file, checked by `check_yaml`; a byte order mark is left out.

    Args:
        path: Regular file.
        argument: Argument that named it, for messages.

    Raises:
        ValueError: see `check_yaml`; or the file is too large, or not in UTF-8.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise UserError(f"`{argument}` has {size:,} bytes, expected a configuration of at most {MOST_BYTES:,}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`{argument}` is not UTF-8 (byte {error.start:,} is 0x{error.object[error.start]:02x}). Save it as UTF-8"
        ) from error
    check_yaml(text, argument)
    return text


def check_yaml(text: str, argument: str) -> None:
    """Refuse YAML of which a part would be lost or which could not be read.

    Args:
        text: YAML.
        argument: Argument that gave it, for messages.

    Raises:
        ValueError: it is too long or not YAML, or has a key twice, of which loaders keep the last; two documents;
            nesting that no configuration has; or an alias that leads to itself or multiplies to too many values.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"`{argument}` has more than {MOST_BYTES:,} characters, expected a configuration")
    reader = _Reader(argument)
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            reader.take(event)
    except yaml.YAMLError as error:
        raise UserError(f"`{argument}` is not YAML: {one_line(error)}") from error


class _Reader:
    """Follow a parser's events, which come one by one however deep or often repeated the values are."""

    def __init__(self, argument: str) -> None:
        self._argument = argument
        self._open: list[_Collection] = []
        self._sizes: dict[str, int | None] = {}  # values of each anchor; None while it is open
        self._documents = 0

    def take(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise self._error(event, "a second document begins, expected one")
        elif isinstance(event, CollectionStartEvent):
            self._open.append(_Collection(event.anchor, isinstance(event, MappingStartEvent)))
            if event.anchor:
                self._sizes[event.anchor] = None
            if len(self._open) > _DEEPEST:
                raise self._error(event, f"values are nested more than {_DEEPEST} deep")
        elif isinstance(event, CollectionEndEvent):
            closed = self._open.pop()
            self._add(event, closed.size, closed.anchor, None)
        elif isinstance(event, ScalarEvent):
            self._add(event, 1, event.anchor, event.value)
        elif isinstance(event, AliasEvent):
            if event.anchor not in self._sizes:
                raise self._error(event, f"the alias *{event.anchor} stands for nothing")
            if (size := self._sizes[event.anchor]) is None:
                raise self._error(event, f"the alias *{event.anchor} is inside of what it stands for")
            self._add(event, size, None, None)

    def _add(self, event: Event, size: int, anchor: str | None, scalar: str | None) -> None:
        if anchor:
            self._sizes[anchor] = size
        if not self._open:
            return
        place = self._open[-1]
        place.size += size
        if place.size > _MOST_VALUES:
            raise self._error(event, f"aliases make more than {_MOST_VALUES:,} values of it")
        if place.is_mapping and place.count % 2 == 0 and scalar is not None:
            if scalar in place.keys and scalar != "<<":
                raise self._error(
                    event, f"the key {scalar!r} is there twice, and only one of them would hold. Put them together"
                )
            place.keys.add(scalar)
        place.count += 1

    def _error(self, event: Event, reason: str) -> UserError:
        return UserError(f"`{self._argument}`, line {event.start_mark.line + 1}: {reason}")


class _Collection:
    """A list or a mapping that is being read."""

    def __init__(self, anchor: str | None, is_mapping: bool) -> None:
        self.anchor, self.is_mapping = anchor, is_mapping
        self.size, self.count = 1, 0  # values in it, aliases followed; keys and values so far
        self.keys: set[str] = set()
