"""Put what a parser or a library has to say of a configuration into one line."""

import argparse
import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lightning.pytorch import Trainer, callbacks

import lightning_mixcn.callbacks
from lightning_mixcn.errors import UserError, did_you_mean, one_line

# Lines of jsonargparse's messages that say what else it tried, or repeat the input.
_NOISE = (
    "Given value",
    "Subtypes:",
    "Errors:",
    "Does not validate",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass of",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
)
_OPTIONS = ("config", "model", "data", "trainer", "seed_everything", "ckpt_path", "plan", "overwrite", "weights_only")
_NO_MAPPING = re.compile(r"'\w+' object has no attribute 'keys'")
_UNKNOWN_CLASS = "Expected a dot import path string: "
_REMOVED_CLASSES = {"RankWatch": "gone, since torch and the launchers end all ranks when one dies. Leave it out"}


def readable(message: str) -> str:
    r"""Reduce jsonargparse's tree of what was tried to the line that matters.

    Args:
        message: Its message, many lines.

    Returns:
        The keys that lead to the error, and the error.

    >>> readable('Parser key "model":\n  Does not validate against any of the Union subtypes\n'
    ...          "  Errors:\n    - Option 'bas' is not accepted\n    - Expected a <class 'NoneType'>")
    "model: Option 'bas' is not accepted"
    """
    kept = []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if line.startswith(_NOISE):
            continue
        if line.startswith("Parser key"):
            line = line.removeprefix('Parser key "').replace('":', ":", 1)
        if line.startswith(_UNKNOWN_CLASS):
            name = line.removeprefix(_UNKNOWN_CLASS)
            line = (
                f"there is no class {name!r}{did_you_mean(name, _known_classes())}. Give one of lightning_mixcn by "
                "its name, another by its full import path"
            )
        for name, why in _REMOVED_CLASSES.items():
            if name in line:
                return f"{name} is {why}"
        kept.append(_NO_MAPPING.sub("expected a mapping as `init_args`", line))
    text = " ".join(kept)
    if text.endswith(":"):  # it says no more than that this is no class
        text += " expected the name of a class, or a mapping of `class_path` and `init_args` with no other key"
    return text + _meant(text)


def _known_classes() -> list[str]:
    schedules = ["WarmupCosine", "WarmupStableDecay"]
    return [*lightning_mixcn.__all__, *lightning_mixcn.callbacks.__all__, *schedules, *callbacks.__all__]


def _meant(message: str) -> str:
    """Return the option that was probably meant by an unknown one, as words to follow the message."""
    unknown = re.search(
        r"(?:[Oo]ption|[Kk]ey) '([^']+)' is not|does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)",
        message,
    )
    if unknown is None:
        return ""
    name = next(filter(None, unknown.groups()))
    classes = re.findall(r"class_path '([\w.]+)'", message)
    if classes:
        return did_you_mean(name, _parameters(classes[-1]))
    trainer = (f"trainer.{each}" for each in inspect.signature(Trainer.__init__).parameters)
    return did_you_mean(name, [*_OPTIONS, *trainer]) or did_you_mean(name.partition(".")[0], _OPTIONS)


def _parameters(class_path: str) -> set[str]:
    """Return the arguments of a class, and of the classes that it hands further ones to."""
    module, _, name = class_path.rpartition(".")
    try:
        kind: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # a class inside of another one, or of a script
        return set()
    constructors = (vars(base).get("__init__", kind) for base in inspect.getmro(kind))
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


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
        raise UserError(
            f"`{what.lower() if what == 'Trainer' else what}` cannot be made: {one_line(cause)} "
            "(MIXCN_TRACEBACK=1 shows the traceback)"
        ) from error
