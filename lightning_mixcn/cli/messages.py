"""Put what a parser or a library has to say of a configuration into one line."""

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_mixcn.errors import UserError, one_line

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
                f"there is no class {name!r}. Give one of lightning_mixcn by its name, another by its full import path"
            )
        for name, why in _REMOVED_CLASSES.items():
            if name in line:
                return f"{name} is {why}"
        kept.append(line)
    return " ".join(kept)


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
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames[-1].f_globals.get("__name__", "").startswith("lightning_mixcn."):
            raise
        made = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "__init__"]
        names = [type(value).__name__ for value in made if value is not None and not isinstance(value, caller)]
        what = names[0] if names else "the configuration"
        raise UserError(f"`{what.lower() if what == 'Trainer' else what}` cannot be made: {one_line(error)}") from error
