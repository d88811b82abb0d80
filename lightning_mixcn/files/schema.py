"""Check plain data that a stranger may have written against a declared structure, before anything uses it.

A structure is put together from the functions below, as ``record({"rows": whole(0, 10)})``. Each makes a check, which
yields the faults of a value: where it is, what was expected, and what came.

>>> check = record({"rows": whole(0, 10)}, {"names": each(TEXT)})
>>> first_fault({"rows": 3, "names": ["a", "b"]}, check)
>>> first_fault({"rows": 3, "names": ["a", None]}, check)
'names[1] is null, expected text'
>>> first_fault({}, check)
'rows is missing'
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_SHOWN_CHARACTERS = 60


class Fault(NamedTuple):
    """Place of a value in the data, and what is wrong with it."""

    place: str
    problem: str


Check = Callable[[Any, str], Iterator[Fault]]


def first_fault(value: Any, check: Check) -> str | None:
    """Return the first fault of a value in words, or nothing."""
    fault = next(check(value, ""), None)
    return None if fault is None else f"{fault.place or 'it'} {fault.problem}"


def whole(low: int, high: int) -> Check:
    """Expect a whole number in a range, both ends included."""
    return expect(f"a whole number of {low:,} to {high:,}", lambda value: _is_whole(value) and low <= value <= high)


def real(low: float, high: float) -> Check:
    """Expect a finite number in a range, both ends included."""

    def is_valid(value: Any) -> bool:
        # Whole numbers are compared as they are: 10**400 is no float.
        is_number = _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
        return is_number and low <= value <= high

    return expect(f"a finite number of {low:g} to {high:g}", is_valid)


def either(*checks: Check) -> Check:
    """Expect what passes one of several checks; the last one says what is wrong."""

    def check(value: Any, place: str) -> Iterator[Fault]:
        if all(next(alternative(value, place), None) for alternative in checks):
            yield from checks[-1](value, place)

    return check


def each(item: Check, length: int | None = None) -> Check:
    """Expect a list, of some length, of what passes a check."""

    def check(value: Any, place: str) -> Iterator[Fault]:
        if not isinstance(value, list | tuple):
            yield _unexpected(place, value, "a list")
        elif length is not None and len(value) != length:
            yield Fault(place, f"has {len(value)} entries, expected {length}")
        else:
            for index, entry in enumerate(value):
                yield from item(entry, f"{place}[{index}]")

    return check


def row_of(*items: Check) -> Check:
    """Expect a list of so many entries, each of which passes its own check."""

    def check(value: Any, place: str) -> Iterator[Fault]:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            yield _unexpected(place, value, f"a list of {len(items)}")
        else:
            for index, (entry, item) in enumerate(zip(value, items, strict=True)):
                yield from item(entry, f"{place}[{index}]")

    return check


def record(required: Mapping[Any, Check], optional: Mapping[Any, Check] | None = None) -> Check:
    """Expect a mapping with some keys; others are not looked at."""

    def check(value: Any, place: str) -> Iterator[Fault]:
        if not isinstance(value, Mapping):
            yield _unexpected(place, value, "a mapping")
            return
        for key, item in (dict(required) | dict(optional or {})).items():
            inner = f"{place}.{key}" if place else str(key)
            if key in value:
                yield from item(value[key], inner)
            elif key in required:
                yield Fault(inner, "is missing")

    return check


def mapping_of(key: Check, item: Check) -> Check:
    """Expect a mapping, of which every key and every value passes a check."""

    def check(value: Any, place: str) -> Iterator[Fault]:
        if not isinstance(value, Mapping):
            yield _unexpected(place, value, "a mapping")
            return
        for name, entry in value.items():
            yield from key(name, f"a key of {place or 'it'}")
            yield from item(entry, f"{place}[{_shown(name)}]")

    return check


def expect(expected: str, is_valid: Callable[[Any], bool]) -> Check:
    """Expect what a function says yes to; the first argument says it in words."""

    def check(value: Any, place: str) -> Iterator[Fault]:
        if not is_valid(value):
            yield _unexpected(place, value, expected)

    return check


def _unexpected(place: str, value: Any, expected: str) -> Fault:
    return Fault(place, f"is {_shown(value)}, expected {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Show a value in a few characters, without writing out what is large."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if hasattr(value, "shape"):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} entries"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)} entries"
    if _is_whole(value) and value.bit_length() > 200:  # Python refuses to write out more than 4,300 digits
        return f"a whole number of {value.bit_length():,} bits"
    text = repr(value) if isinstance(value, str | int | float) else f"of the type {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


ANYTHING: Check = expect("anything", lambda value: True)
TEXT: Check = expect("text", lambda value: isinstance(value, str))
FLAG: Check = expect("true or false", lambda value: isinstance(value, bool))
NULL: Check = expect("null", lambda value: value is None)
MAPPING: Check = record({})
PLAIN: Check = expect("text, a number, true, false or null", lambda value: isinstance(value, str | int | float | None))
