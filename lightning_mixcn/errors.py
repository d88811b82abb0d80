"""Errors that the user can mend: the command line prints them as one line and ends with exit code 2.

A message has four parts: what is wrong (the argument, or the file and line), what was expected, what came, what to do.
Everything else that is raised is a bug of this package or of a library, and keeps its traceback.
"""

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches

_MESSAGE_CHARACTERS = 300
_LEAST_OF_A_NAME = 3


class UserError(ValueError):
    """Report an argument, a file or a run that cannot be used."""


class MissingFileError(UserError, FileNotFoundError):
    """Report a file, a folder or a model that is not there."""


class ExistingFileError(UserError, FileExistsError):
    """Report an output that would replace something."""


class InUseError(UserError):
    """Report an output that another process is writing."""


class NotAFolderError(UserError, NotADirectoryError):
    """Report a file where a folder is expected."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """Report an optional package that is not installed."""


class NonFiniteError(UserError, FloatingPointError):
    """Report a loss or a gradient that is NaN or infinite."""


# What is imported only where it is needed: the extra of this package that brings it.
EXTRAS = {
    "gguf": "gguf",
    "llama_cpp": "llama",
    "lm_eval": "eval",
    "rensa": "data",
    "shtab": "completion",
    "wandb": "wandb",
}


def require_package(module: str, user: str, otherwise: str = "") -> None:
    """Refuse to go on without an optional package.

    Args:
        module: Name under which it is imported, one of `EXTRAS`.
        user: What needs it; begins the message.
        otherwise: What can be done without it, to end the message.

    Raises:
        ModuleNotFoundError: it is not installed; says the command of pip.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(
            f"{user} needs the package {module}, which is not installed. Install it: {pip_command(module)}{otherwise}"
        )


def pip_command(module: str) -> str:
    """Return the command that installs an optional package.

    >>> pip_command("lm_eval")
    "pip install 'lightning_mixcn[eval]'"
    """
    return f"pip install 'lightning_mixcn[{EXTRAS[module]}]'"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of the known names that was probably meant: the most alike, else the shortest that contains it.

    >>> nearest("max_step", ["min_steps", "max_steps"]), nearest("seed", ["data", "seed_everything"])
    ('max_steps', 'seed_everything')
    """
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.7)
    longer = [each for each in names if name in each and len(name) >= _LEAST_OF_A_NAME]
    return close[0] if close else min(longer, key=len, default=None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return words that name the nearest of the known names, to follow a message; none where none is near.

    >>> did_you_mean("max_step", ["max_steps", "min_steps"])
    " (did you mean 'max_steps'?)"
    """
    found = nearest(name, known)
    return "" if found is None else f" (did you mean {found!r}?)"


def one_line(error: BaseException) -> str:
    """Shorten a library's message for one of ours."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
