"""Compare arguments with the signature that declares them: kinds, null, and the bounds in its `Annotated` hints.

The command line and Python go through the same check, which every public constructor calls first. A bound is written
where the parameter is, so that a reader finds it there:

>>> def sample(count: Annotated[int, Between(1, 64)] = 4, seed: Seed | None = None): ...
>>> check_arguments(sample, {"count": 0})
Traceback (most recent call last):
    ...
lightning_mixcn.errors.UserError: `count=0`: expected at least 1
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
    runtime_checkable,
)

from lightning_mixcn.errors import UserError

_SHOWN_CHARACTERS = 80


@runtime_checkable
class Bound(Protocol):
    """What `Annotated` says of a value beyond its kind."""

    def expected(self, value: Any) -> str | None:
        """Return what was expected in place of a value of the right kind, or None where it will do."""


@dataclass(frozen=True)
class Between:
    """Bounds of a number.

    Args:
        least: Smallest value.
        most: Largest value: what no run on a machine of today could use, so that a slip of the finger is no hang.
        remark: Words that follow in the message.
        excluded: Ends that are no values themselves.
    """

    least: float
    most: float
    remark: str = ""
    excluded: tuple[float, ...] = ()

    def expected(self, value: Any) -> str | None:
        """Name the bound that a number breaks."""
        if not (value > self.least if self.least in self.excluded else value >= self.least):
            bound = f"more than {self.least}" if self.least in self.excluded else f"at least {self.least}"
        elif not (value < self.most if self.most in self.excluded else value <= self.most):
            bound = f"less than {self.most}" if self.most in self.excluded else f"at most {self.most}"
        else:
            return None
        return f"{bound} {self.remark}".strip()


@dataclass(frozen=True)
class Filled:
    """Text, a list or a mapping that is not empty.

    Args:
        expects: What is expected.
    """

    expects: str

    def expected(self, value: Any) -> str | None:
        """Say what is missing; no path and no name has a NUL in it."""
        return None if value and not (isinstance(value, str) and "\0" in value) else self.expects


MOST_STEPS = 10**9
Steps = Annotated[int, Between(1, MOST_STEPS)]
Seed = Annotated[int, Between(0, 2**32 - 1)]  # Lightning's and numpy's range
Share = Annotated[float, Between(0, 1, excluded=(1,))]
Count = Annotated[int, Between(1, 10**12)]
Documents = Annotated[float, Between(0, 10**9, "documents, or a share of them below 1", excluded=(0,))]
Examples = Annotated[int, Between(0, 1000)]
NewTokens = Annotated[int, Between(1, 2**20)]
RowTokens = Annotated[int, Between(2, 2**20, "(each token is predicted from another)")]
Name = Annotated[str, Filled("a name or a path")]


def check_arguments(declared: Callable[..., Any], values: Mapping[str, Any], place: str = "") -> None:
    """Refuse values that a signature does not allow.

    Args:
        declared: Class, function or `TypedDict` whose hints say what is allowed.
        values: Values by name, such as ``locals()`` at the beginning of a constructor; names without a hint are passed
            over.
        place: What leads to the names, such as ``sources[0].``, for the message.

    Raises:
        UserError: a value is null, of another kind, not finite, or out of its bounds.
    """
    for name, hint in _hints(declared).items():
        if name in values and (found := _mismatch(values[name], hint)) is not None:
            owner = f"; see {type(values['self']).__name__}" if "self" in values else ""
            raise UserError(f"`{place}{name}{found.inside}={_shown(found.value)}`: expected {found.expected}{owner}")


def _shown(value: Any) -> str:
    """Return a value for a message: short, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


class _Mismatch(NamedTuple):
    """Where in an argument a value is, the value, what was expected, and whether another kind of value was."""

    inside: str
    value: Any
    expected: str
    is_kind: bool


# By the class of a hint: the classes that a value may have, and their name in a message.
_KINDS: dict[type, tuple[Any, str]] = {
    NoneType: (NoneType, "null"),
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "text"),  # a path from Python
}


@lru_cache(maxsize=256)
def _hints(declared: Callable[..., Any]) -> dict[str, Any]:
    plain = is_typeddict(declared) or not isinstance(declared, type)
    hints = get_type_hints(declared if plain else declared.__init__, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _mismatch(value: Any, hint: Any) -> _Mismatch | None:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if (found := _mismatch(value, parts[0])) is not None:
            return found
        told = (bound.expected(value) for bound in parts[1:] if isinstance(bound, Bound))
        return next((_Mismatch("", value, text, False) for text in told if text is not None), None)
    if origin in (Union, UnionType):
        return _of_none(value, [_mismatch(value, part) for part in parts])
    if origin is Literal:
        names = ", ".join(map(str, parts))
        fits = any(type(value) is type(part) and value == part for part in parts)
        return None if fits else _Mismatch("", value, f"one of {names}" if len(parts) > 1 else names, True)
    if isinstance(origin, type) and issubclass(origin, Collection):
        return _in_collection(value, origin, parts)
    if is_typeddict(hint):
        return _in_record(value, hint)
    return _of_kind(value, origin or hint)


def _of_none(value: Any, found: Sequence[_Mismatch | None]) -> _Mismatch | None:
    """Return what is wrong with a value that fits no member of a union: first of the member whose kind it is."""
    wrong = [mismatch for mismatch in found if mismatch is not None]
    if len(wrong) < len(found):
        return None
    near = [mismatch for mismatch in wrong if not mismatch.is_kind]
    kinds = sorted((mismatch.expected for mismatch in wrong), key="null".__ne__)  # null first
    return near[0] if near else _Mismatch("", value, " or ".join(kinds), True)


def _in_collection(value: Any, origin: type, parts: tuple[Any, ...]) -> _Mismatch | None:
    """Check a list or a mapping and what is in it."""
    is_mapping = issubclass(origin, Mapping)
    if not isinstance(value, Mapping if is_mapping else Collection) or (
        not is_mapping and isinstance(value, str | bytes | Mapping)
    ):
        return _Mismatch("", value, "a mapping" if is_mapping else "a list", True)
    if is_dataclass(parts[-1]):
        return None  # what reads them takes mappings too, and checks both
    checks = [(key, key, parts[0]) for key in value] if is_mapping else []
    checks += [(key, item, parts[-1]) for key, item in (dict(value) if is_mapping else dict(enumerate(value))).items()]
    for key, item, hint in checks:
        if (found := _mismatch(item, hint)) is not None:
            return found._replace(inside=f"[{key!r}]{found.inside}", is_kind=False)
    return None


def _in_record(value: Any, kind: Any) -> _Mismatch | None:
    """Check a mapping whose keys a `TypedDict` declares."""
    hints = _hints(kind)
    if not isinstance(value, Mapping) or value.keys() - hints.keys() or kind.__required_keys__ - value.keys():
        return _Mismatch("", value, f"a mapping of {', '.join(hints)}", False)
    for key, item in value.items():
        if (found := _mismatch(item, hints[key])) is not None:
            return found._replace(inside=f"[{key!r}]{found.inside}", is_kind=False)
    return None


def _of_kind(value: Any, kind: Any) -> _Mismatch | None:
    """Check a value that is neither a union nor a collection."""
    if kind is Callable:
        return None if callable(value) else _Mismatch("", value, "a function or a class", True)
    if kind is Any or not isinstance(kind, type):
        return None  # a type variable has no class
    if is_typeddict(kind):  # what reads one checks what is in it
        return None if isinstance(value, Mapping) else _Mismatch("", value, "a mapping", True)
    classes, words = _KINDS.get(kind, (kind, f"a {kind.__name__}"))
    if not isinstance(value, classes) or (isinstance(value, bool) and kind in (int, float)):
        return _Mismatch("", value, words, True)
    return _Mismatch("", value, "a finite number", False) if kind is float and not _is_finite(value) else None


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False
