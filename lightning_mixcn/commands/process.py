"""Run ``mixcn`` as a person would, in a process of its own, and see how long it took and how much memory."""

import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lightning_mixcn.masking import mask_secrets

# ``ru_maxrss`` is in kibibytes on Linux and in bytes on macOS (getrusage(2) of both).
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    Linux hands ``ru_maxrss`` down from the process that started this one, however large it was (getrusage(2), proc(5));
    ``VmHWM`` is this program's own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        high_water = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if high_water:
            return int(high_water[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


_NOTHING: Mapping[str, str] = MappingProxyType({})
_MIXCN = (sys.executable, "-m", "lightning_mixcn")


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Args:
        seconds: Wall time, starting Python included.
        peak_rss_bytes: Largest resident memory of the process or of one of its own children.
    """

    seconds: float
    peak_rss_bytes: int


class CommandFailed(RuntimeError):  # noqa: N818  # reads as what happened
    """A command ended with an error, which it has printed itself."""


def run_mixcn(
    arguments: Sequence[str],
    typed: str = "",
    defaults: Mapping[str, str] = _NOTHING,
    inherited: Sequence[int] = (),
) -> Usage:
    """Run ``mixcn`` with these arguments; what it prints goes to the terminal.

    Args:
        arguments: Arguments of ``mixcn``.
        typed: Text of its standard input.
        defaults: Environment variables that it gets unless they are set already.
        inherited: Open file descriptors that it keeps open, such as a lock's.

    Raises:
        CommandFailed: the exit code is not 0.
    """
    return run([*_MIXCN, *arguments], shlex.join(["mixcn", *arguments]), typed, defaults, inherited)


def output_of_mixcn(arguments: Sequence[str]) -> str:
    """Return what ``mixcn`` prints with these arguments; nothing goes to the terminal.

    Raises:
        CommandFailed: the exit code is not 0; the message is the last line of its standard error.
    """
    done = subprocess.run([*_MIXCN, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise CommandFailed("".join(last).removeprefix("mixcn: error: ") or f"exit code {done.returncode}")
    return done.stdout


def run(
    command: Sequence[str],
    shown: str,
    typed: str = "",
    defaults: Mapping[str, str] = _NOTHING,
    inherited: Sequence[int] = (),
) -> Usage:
    """Run a command, show it first, and measure it.

    Args:
        command: Program and arguments.
        shown: Text to print for it.
        typed: Text of its standard input, at most what a pipe holds (64 KiB on Linux).
        defaults: Environment variables that it gets unless they are set already.
        inherited: Open file descriptors that it keeps open.

    Raises:
        CommandFailed: the exit code is not 0.
    """
    shown = mask_secrets(shown)
    print(f"$ {shown}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**defaults, **os.environ}, stdin=subprocess.PIPE, text=True, pass_fds=inherited
    )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(typed)
    # Not `process.wait`: only wait4 says what this one child used.
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # a signal ends this process: the command ends before it, and saves what it saves
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise CommandFailed(f"`{shown}` ended with exit code {process.returncode}; the reason is above.")
    return Usage(time.perf_counter() - start, usage.ru_maxrss * MAXRSS_UNIT)
