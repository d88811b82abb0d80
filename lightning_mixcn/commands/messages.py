"""Put what a parser or a library has to say of arguments into one line; imports no torch."""

import argparse
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lightning_mixcn.errors import EXTRAS, UserError, did_you_mean, one_line, pip_command

from .catalogue import nearest_class
from .classes import arguments_of, find_class

# Lines of jsonargparse's messages that say what else it tried, or repeat the input.
_NOISE = (
    "Given value",
    "Subtypes:",
    "Errors:",
    "Does not validate",
    "Expected a path but",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass of",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
)
_OPTIONS = (
    "config",
    "model",
    "data",
    "trainer",
    "seed_everything",
    "ckpt_path",
    "plan",
    "card",
    "overwrite",
    "weights_only",
)
_NO_MAPPING = re.compile(r"'\w+' object has no attribute 'keys'")
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (?P<path>.+)|module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'"
)
_CALLABLE = re.compile(r"Type typing\.Callable.*? expects a function or a callable class: (.*)\. Got value: (.*)")
_CHOICE = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_KINDS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "str": "text",
}
_KEY, _CLASS = "Parser key", "Problem with given class_path"
_REMOVED_CLASSES = {"RankWatch": "gone, since torch and the launchers end all ranks when one dies. Leave it out"}


def readable(message: str, options: Iterable[str] = ()) -> str:
    r"""Reduce jsonargparse's tree of what was tried to the line that matters.

    Args:
        message: Its message, many lines.
        options: Options of the parser, of which one may have been meant; none for those of a run.

    Returns:
        The keys that lead to the error, and the error.

    >>> readable('Parser key "model":\n  Does not validate against any of the Union subtypes\n'
    ...          "  Errors:\n    - Option 'bas' is not accepted\n    - Expected a <class 'NoneType'>")
    "model: Option 'bas' is not accepted"
    """
    kept, expected = list[str](), list[str]()
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if not line or line.startswith(_NOISE):
            continue
        if words := _expected(line):
            expected += words
            continue
        clause = _clause(line, message, kept)
        for name, why in _REMOVED_CLASSES.items():
            if name in clause:
                return f"{name} is {why}"
        if clause in kept:  # the same of another class that was tried
            while kept[-1].startswith(_CLASS):
                kept.pop()
        else:
            kept.append(clause)
    text = " ".join(kept)
    if expected and (not text or text.endswith(":")):
        return f"{text} {_wrong_value(expected, message)}".strip()
    if text.endswith(":"):  # it says no more than that this is no class
        text += " expected the name of a class, or a mapping of `class_path` and `init_args` with no other key"
    return text + _meant(text, options)


def _expected(line: str) -> list[str]:
    """Return what a line says was expected: kinds of values, or some of a few."""
    if (choices := _CHOICE.match(line)) is not None:
        return [choice.strip("' ") for choice in choices[1].split(",")]
    kind = re.match(r"Expected a <class '([\w.]+)'>", line)
    return [] if kind is None else [_KINDS.get(kind[1], kind[1].rpartition(".")[2])]


def _wrong_value(expected: list[str], message: str) -> str:
    """Say what was expected and what came; the value is in the innermost line that has one."""
    value = re.findall(r"(?:Got value|Given value): (.*)", message)[:1]
    choices = list(dict.fromkeys(expected))
    got = "".join(f", got {each!r}" for each in value)
    return f"expected {' or '.join(choices)}{got}{''.join(did_you_mean(each, choices) for each in value)}"


def _clause(line: str, message: str, kept: list[str]) -> str:
    """Return a line of jsonargparse's without its own terms."""
    if line.startswith(_KEY):
        return line.removeprefix(f'{_KEY} "').replace('":', ":", 1)
    if (made := _CALLABLE.match(line)) is not None:
        kind = re.search(r"class_path='([\w.]+)'", made[2])
        line = made[1] if kind is None else f"{_CLASS} '{kind[1]}': {made[1]}"
    if (missing := _NO_CLASS.search(line)) is None:
        return _NO_MAPPING.sub("expected a mapping as `init_args`", line).removesuffix(".")
    path = missing["path"] or f"{missing['module']}.{missing['name']}"
    if kept and kept[-1] == f"{_CLASS} '{path}':":
        kept.pop()
    nested = re.search(r"NestedArg\(key='([\w.]+)', val='(.*)'\)", message)
    if nested is not None and nested[2] != path:
        return f"{nested[1]!r} is an option of a class, and {path!r} is none. Name the class before it"
    if kept and kept[-1].endswith("sources:"):
        return f"expected a mapping such as {{name: zh, path: texts/zh}}, got {path!r}"
    near = nearest_class(path)
    return (
        f"there is no class {path!r}{f' (did you mean {near!r}?)' if near else ''}. Give one of lightning_mixcn by its "
        "name, another by its full import path"
    )


def _meant(message: str, options: Iterable[str]) -> str:
    """Return the option that was probably meant by an unknown one, as words to follow the message."""
    if (choice := re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", message)) is not None:
        return did_you_mean(choice[1], re.findall(r"'([^']+)'", choice[2]))
    unknown = re.search(
        r"(?:[Oo]ption|[Kk]ey) '([^']+)' is not|does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)",
        message,
    )
    if unknown is None:
        return ""
    name = next(filter(None, unknown.groups()))
    if known := list(options):
        return did_you_mean(f"--{name}", known)
    classes = re.findall(r"class_path '([\w.]+)'", message)
    if classes:
        return did_you_mean(name, _parameters(classes[-1]))
    trainer = (f"trainer.{each}" for each in _parameters("lightning.pytorch.Trainer"))
    return did_you_mean(name, [*_OPTIONS, *trainer]) or did_you_mean(name.partition(".")[0], _OPTIONS)


def _parameters(path: str) -> list[str]:
    """Return the arguments of a class, and of the classes that it hands further ones to."""
    found = find_class(path)
    return [] if found is None else [argument.name for argument in arguments_of(found)]


@contextmanager
def libraries_in_one_line(caller: type) -> Iterator[None]:
    """Report what a library raises in a constructor as a fault of what the configuration gave it.

    Args:
        caller: Class whose own constructor is on the way there.

    Raises:
        ValueError: names the class whose constructor was called; errors of this package itself are let through.
    """
    try:
        yield
    except (UserError, OSError, argparse.ArgumentError):
        raise
    except Exception as error:
        cause: BaseException = error
        # jsonargparse wraps what the constructor of a class raises, and a UserError has a cause of its own.
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        is_ours = bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("lightning_mixcn.")
        if is_ours or isinstance(cause, UserError | OSError):
            raise
        made = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "__init__"]
        names = [type(value).__name__ for value in made if value is not None and not isinstance(value, caller)]
        what = names[0] if names else "the configuration"
        missing = next((name for name in EXTRAS if isinstance(cause, ImportError) and name in str(cause)), None)
        install = "" if missing is None else f". Install it: {pip_command(missing)}"
        raise UserError(
            f"`{what.lower() if what == 'Trainer' else what}` cannot be made: {one_line(cause)}{install} "
            "(MIXCN_TRACEBACK=1 shows the traceback)"
        ) from error
