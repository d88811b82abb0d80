"""Run a stage in a process group of its own with a time limit, and keep what it has found whatever becomes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any, NamedTuple

_LARGEST_FIGURES = 2**24  # bytes; a stage's own are some thousands


class Stage(NamedTuple):
    """A part of the measurement.

    Args:
        name: Module in this folder.
        seconds: Its share of the time, at 9.3 minutes and full size.
        least_seconds: It is not started with less.
    """

    name: str
    seconds: float
    least_seconds: float


STAGES = (
    Stage("env", 25, 5),
    Stage("correct", 130, 10),
    Stage("block", 70, 10),
    Stage("step", 140, 10),
    Stage("generate", 40, 10),
    Stage("long", 133, 10),
    Stage("decide", 20, 5),
)
# To import torch from a slow disk may take so long for the first time: a stage is not killed for that.
_GRACE_SECONDS = 30


class Deadline:
    """The end of the whole measurement.

    Args:
        minutes: Time from now on.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()


def limit_seconds(stage: Stage, left: float, later: Sequence[Stage]) -> float:
    """Return the seconds that a stage may take; 0 if it is not to be started.

    It has its share, a grace, and all that those before it did not use. The last one keeps its time: it is short, and
    makes something of all others' figures.

    Args:
        stage: The stage.
        left: Seconds that are left for all.
        later: Stages that come after it.
    """
    kept = later[-1].seconds if later else 0.0
    unused = left - sum(other.seconds for other in later)
    limit = min(left - kept, max(stage.seconds + _GRACE_SECONDS, unused))
    return limit if limit >= stage.least_seconds else 0.0


def run_stage(command: Sequence[str], limit_s: float, figures: Path, log: IO[str]) -> dict[str, Any]:
    """Run a stage's command; its whole process group is killed in the end, or when its time is over.

    Args:
        command: Program and arguments.
        limit_s: Seconds after which it is killed.
        figures: File in which it leaves an object of JSON, from time to time; removed here.
        log: Text file that gets what it prints; the terminal gets it, too.

    Returns:
        ``seconds`` and ``limit_seconds``, the last ``figures`` if it has left any, and ``error`` in one line if it
        failed, was late or wrote something else.
    """
    figures.unlink(missing_ok=True)
    start = time.monotonic()
    problem = _run(command, limit_s, log)
    entry: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "limit_seconds": round(limit_s, 1)}
    try:
        found = read_figures(figures)
        # What it says itself explains more than its exit code.
        problem = found.pop("error", None) or problem
        entry["figures"] = found
    except FileNotFoundError:
        problem = problem or "wrote no figures"
    except ValueError as error:
        problem = problem or f"wrote figures that cannot be read: {error}"
    figures.unlink(missing_ok=True)
    return entry | ({"error": " ".join(str(problem).split())[:300]} if problem else {})


def _run(command: Sequence[str], limit_s: float, log: IO[str]) -> str | None:
    """Return what went wrong, in words."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    copying = Thread(target=_copy, args=(process.stdout, log), daemon=True)
    copying.start()
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"killed after {limit_s:.0f} s, its limit"
    finally:  # Ctrl-C, too; what it has started must not keep the GPU
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        copying.join(10)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else None


def _copy(lines: IO[str], log: IO[str]) -> None:
    with lines:
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
            log.flush()


def read_figures(file: Path) -> dict[str, Any]:
    """Read an object of JSON.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is something else; the message says what.
    """
    if file.stat().st_size > _LARGEST_FIGURES:
        raise ValueError(f"{file.stat().st_size:,} bytes, expected at most {_LARGEST_FIGURES:,}")
    found = json.loads(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, expected an object")
    return found


def write_figures(file: Path, figures: dict[str, Any]) -> None:
    """Write an object of JSON under another name, then rename it: a reader sees the old one or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)


class Figures(dict[str, Any]):
    """What a stage has found.

    Args:
        file: File that `save` writes, for `run_stage` to read.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def save(self) -> None:
        """Write all figures: they outlast the stage if it is killed."""
        write_figures(self.file, self)
