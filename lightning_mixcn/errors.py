"""Errors that the user can mend: the command line prints them as one line and ends with exit code 2.

A message has four parts: what is wrong (the argument, or the file and line), what was expected, what came, what to do.
Everything else that is raised is a bug of this package or of a library, and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches

_MESSAGE_CHARACTERS = 300


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


class NonFiniteError(UserError, FloatingPointError):
    """Report a loss or a gradient that is NaN or infinite."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return words that name the nearest of the known names, to follow a message; none where none is near.

    >>> did_you_mean("max_step", ["max_steps", "min_steps"])
    " (did you mean 'max_steps'?)"
    """
    close = get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_line(error: BaseException) -> str:
    """Shorten a library's message for one of ours."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
