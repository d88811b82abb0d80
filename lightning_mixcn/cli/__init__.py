"""The command ``mixcn``: what needs no torch is answered here, the rest is imported when a subcommand runs."""

import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_mixcn.commands.process import CommandFailed
from lightning_mixcn.commands.table import COMMANDS
from lightning_mixcn.errors import UserError, did_you_mean, one_line, require_package
from lightning_mixcn.files.atomic import owned
from lightning_mixcn.masking import mask_secrets, visible

_OF_THE_TRAINER = ("fit", "validate", "test", "predict")
_COMPLETION = "--print_completion"
_TRACEBACK = "MIXCN_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mixcn``.

    Args:
        argv: Arguments without the program's name; those of the process where it is ``None``.

    Returns:
        Exit code: 0, or 2 where what the user gave cannot be used, 1 where a loader worker or another rank was lost,
        and 128 + N where signal N ended the command, which one line on stderr explains, unless it is SIGPIPE, the end
        of whoever read standard output.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _signals_raised():
            code = _run(arguments)
            _flush()
    except (KeyboardInterrupt, _Signalled) as stop:
        number = stop.number if isinstance(stop, _Signalled) else signal.SIGINT
        return _report(f"{signal.Signals(number).name} ended the command. Nothing half written is left", 128 + number)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():  # such as `| head -1`, which has what it wanted
            _forget_output()
            return 128 + signal.SIGPIPE
        if os.environ.get(_TRACEBACK) or (message := _explained(error)) is None:
            raise
        return _report(message, 1 if _lost_worker(error) or _lost_rank(error) else 2)
    return code


def _run(arguments: list[str]) -> int:
    """Answer what needs no torch; else import what the subcommand needs and run it. Return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["help"]:
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from lightning_mixcn import __version__

        print(f"mixcn {__version__}")
        return 0
    if arguments[0] not in COMMANDS and not arguments[0].startswith(_COMPLETION):
        near = did_you_mean(arguments[0], COMMANDS)
        return _report(
            f"unknown subcommand {arguments[0]!r}{near}. Expected one of {', '.join(COMMANDS)}; see mixcn --help"
        )
    if arguments[0].startswith(_COMPLETION) and any("shtab" in argument for argument in arguments):
        require_package("shtab", "completion in the shell")
    if arguments[0] in _OF_THE_TRAINER and {"-h", "--help"} & set(arguments):
        from .help import page

        print(page(arguments[0]))
        return 0
    from .allocator import grow_gpu_segments, keep_freed_memory

    keep_freed_memory()  # before torch allocates
    grow_gpu_segments()
    # A `class_path` may name a module in the folder one works in; last, so that it hides nothing.
    sys.path.append(os.getcwd())
    _show_log()
    sys.excepthook = _show_traceback
    if arguments[0] in COMMANDS and arguments[0] not in _OF_THE_TRAINER:
        from lightning_mixcn.commands.functions import parse_function

        function, given = parse_function(arguments[0], arguments[1:])
        with _owned_output(given.get("out")):
            function(**given)
    else:
        from .trainer import run_trainer

        if (plan := run_trainer(arguments)) is not None:
            print(plan.text())
    return 0


def _flush() -> None:
    """Write what was printed: at the end of Python, a full disk or a closed pipe would be a traceback.

    Raises:
        OSError: it cannot be written.
    """
    if sys.stdout is None:  # it was closed from the beginning
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _forget_output()
        raise


def _forget_output() -> None:
    """Let what was not written go nowhere, lest the end of Python tries again (the note on SIGPIPE in its `signal`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_left() -> bool:
    """Tell whether nobody reads standard output any more."""
    with suppress(OSError, AttributeError):  # a notebook's is no file, and a closed one is None
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # an error is told whatever is asked for
        return bool(poll.poll(0))
    return False


_ENDING = (signal.SIGTERM, signal.SIGHUP)


class _Signalled(BaseException):
    """Report the signal that ends the command.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Raise `_Signalled` on SIGTERM and SIGHUP; what ignores or handles one already keeps it, such as nohup.

    Training has handlers of its own, which save first. Python allows handlers in the main thread only.
    """
    process = os.getpid()

    def receive(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked one, such as a pool's, dies as ever
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the cleaning up
        raise _Signalled(number)

    is_main = threading.current_thread() is threading.main_thread()
    taken = [number for number in _ENDING if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _owned_output(out: str | None) -> AbstractContextManager[None]:
    """Keep a second process from working on the same output; of a launcher's processes, only the first one writes."""
    place = None if out is None else Path(out).expanduser().resolve()
    if place is None or not place.name or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return owned(place)


class _StderrHandler(logging.Handler):
    """Print records as they are, to the stderr of the moment: a notebook or a progress bar may replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        print(mask_secrets(visible(self.format(record))), file=sys.stderr)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, but for what is secret in its messages: it ends in somebody's issue."""
    print(mask_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _show_log() -> None:
    """Show what the package logs of the data; Python itself would show warnings only."""
    logger = logging.getLogger("lightning_mixcn")
    if not logger.hasHandlers():
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mixcn SUBCOMMAND …",
            "",
            "Adapt Mixtral-style mixture-of-experts models to another language, in 4 bits, on few GPUs.",
            "",
            *lines,
            "",
            "mixcn SUBCOMMAND --help lists a subcommand's options, mixcn help CLASS those of a class by its name.",
            f"mixcn {_COMPLETION}=shtab-bash (or -zsh, -tcsh) prints a script for your shell's completion.",
        ]
    )


def _report(message: str, code: int = 2) -> int:
    with suppress(OSError):  # it is what the message says
        _flush()
    print(f"mixcn: error: {mask_secrets(visible(' '.join(message.split())))}", file=sys.stderr)
    return code


def _explained(error: BaseException | None) -> str | None:
    """Return the message for the user, or None for a bug, whose traceback is worth more."""
    if error is None:
        return None
    if isinstance(error, UserError | CommandFailed):
        return str(error)
    if isinstance(error, OSError):  # a full disk, a missing permission
        return f"{error} ({_TRACEBACK}=1 shows the traceback)"
    if isinstance(error, Exception) and _lost_worker(error):
        return (
            f"{error.__cause__ or error} It may have run out of memory: lower `data.init_args.num_workers`, or look "
            "into the system's log"
        )
    if isinstance(error, Exception) and (fate := _lost_rank(error)):
        return (
            f"another rank of this run {fate}. torch says here: {one_line(error).rstrip('.')}. Start all ranks again, "
            "to go on with `--ckpt_path last`"
        )
    return _explained(error.__cause__)  # jsonargparse wraps what the constructor of a class raises


def _lost_worker(error: Exception) -> bool:
    """Tell whether torch says that a loader's worker was killed or crashed, wherever the training process was."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


# What torch says once the time of the strategy has passed: gloo, NCCL, and the store where the ranks meet.
_LATE = (
    "Application timeout caused pair closure",
    "Timed out waiting",
    "collective operation timeout",
    "waiting for clients",
    "while trying to connect to",
)


def _lost_rank(error: Exception) -> str | None:
    """Return what torch says has become of another rank's process, or None where it says nothing of one."""
    message = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if "remote process exited" in message or ("gloo" in message and "by peer" in message):
        return "ended, and said why, or was killed"
    if any(sign in message for sign in _LATE):
        return "did not answer in the time of `trainer.strategy`: it is stopped, hangs, or was never started"
    return None


def __getattr__(name: str) -> Callable[..., object]:
    """Import `MixcnCLI` when it is first asked for (PEP 562), since it needs torch."""
    if name != "MixcnCLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import MixcnCLI

    return MixcnCLI
