"""`mixcn` runs in processes of their own that begin at once, to be killed and signalled.

As a program it imports everything once. For each line on stdin, a JSON object of `lead`'s settings, it forks a process
that leads a group of its own and forks one process a rank; it prints the leader's process id, and when that has ended
a list of the ranks' exit codes.
"""

import builtins
import importlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import lightning_mixcn.cli.trainer
from lightning_mixcn.cli import main
from lightning_mixcn.commands import process as commands

assert lightning_mixcn.cli.trainer  # imported for the forked processes' sake


_CALLS = ("rename", "replace", "link", "unlink", "fsync", "symlink", "mkdir", "rmdir", "truncate", "ftruncate")


class CountedCalls:
    """This process's calls that change the file system, counted, and the process killed before one of them.

    Args:
        log: File for a line of JSON a call: what it is, and a number that changes with any file of the working folder.
        kill_at: Number of the call before which the process kills itself; 0 for none, and only then they are listed.
    """

    def __init__(self, log: str, kill_at: int) -> None:
        self.counting = True
        self._process, self._number, self._kill_at = os.getpid(), 0, kill_at
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for name in _CALLS:
            self._count(os, name, lambda *_, **__: True)
        self._count(os, "open", lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        for module in (builtins, io):
            self._count(module, "open", lambda file, mode="r", *_, **__: set(mode) & set("wax+"))

    def _count(self, module: Any, name: str, counts: Callable[..., Any]) -> None:
        call = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if self.counting and os.getpid() == self._process and counts(*arguments, **options):
                self._number += 1
                if self._kill_at == 0:
                    line = json.dumps([f"{self._number} {name} {arguments}", state_of(os.getcwd())])
                    os.write(self._log, line.encode() + b"\n")
                if self._number == self._kill_at:
                    os.kill(self._process, signal.SIGKILL)
            return call(*arguments, **options)

        setattr(module, name, counted)

    def uncounted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts nothing meanwhile, as it would not in a process of its own."""

        def wrapper(*arguments: Any, **options: Any) -> Any:
            self.counting = False
            try:
                return call(*arguments, **options)
            finally:
                self.counting = True

        return wrapper


def state_of(folder: str) -> int:
    """Return a number that changes with any file below a folder."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        below = state_of(entry.path) if entry.is_dir(follow_symlinks=False) else 0
        found.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns, below))
    return hash(tuple(found))


@cache
def prepare(function: str) -> None:
    """Import and call a function, ``module:name``, once for all runs from now on; an empty string is none."""
    if function:
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)()


def work(rank: int, run: dict[str, Any]) -> int:
    """Run `mixcn` as one rank. Returns: its exit code."""
    if run["ranks"] > 1:  # Lightning uses the group that is there, which meets through a file instead of a port
        os.environ["LOCAL_RANK"] = str(rank)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{run['log']}.meet", rank=rank, world_size=run["ranks"]
        )
    if run["kill_at"] >= 0:
        calls = CountedCalls(f"{run['log']}.calls", run["kill_at"])
        commands.run_mixcn = calls.uncounted(commands.run_mixcn)
    return main(run["arguments"])


def lead(run: dict[str, Any]) -> None:
    """Run all ranks, write their process ids and exit codes to files, and exit.

    Args:
        run: ``ranks``, ``folder`` to work in, ``arguments`` of `mixcn`, ``kill_at`` (see `CountedCalls`; -1 counts
            nothing), ``cache``, the folder of unpacked texts or null for the tests' common one, and ``log``, the file
            for what they print; the process ids are in the same with ``.pids``, the exit codes with ``.codes``, the
            calls with ``.calls``.
    """
    os.setsid()
    if run["cache"]:
        os.environ["MIXCN_CACHE"] = run["cache"]
    log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(run["folder"])
    processes = []
    for rank in range(run["ranks"]):
        process = os.fork()
        if process == 0:
            try:
                code = work(rank, run)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        processes.append(process)
    Path(f"{run['log']}.pids").write_text(json.dumps(processes))
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    Path(f"{run['log']}.codes").write_text(json.dumps(codes))
    os._exit(0)


def serve() -> None:
    """Run what stdin says, one run at a time."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        run = json.loads(line)
        prepare(run["prepare"])
        process = os.fork()
        if process == 0:
            lead(run)
        print(process, flush=True)
        os.waitpid(process, 0)
        codes = Path(f"{run['log']}.codes")
        print(codes.read_text() if codes.exists() else "[]", flush=True)


if __name__ == "__main__":
    serve()
