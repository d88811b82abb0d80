"""`mixcn` runs in processes of their own that begin at once, to be killed and signalled.

As a program it imports everything once. For each line on stdin, a JSON object of `lead`'s settings, it forks a process
that leads a group of its own and forks one process a rank; it prints the leader's process id, and when that has ended
a list of the ranks' exit codes.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import lightning_mixcn.cli.trainer
from lightning_mixcn.cli import main

assert lightning_mixcn.cli.trainer  # imported for the forked processes' sake


_CALLS = ("rename", "replace", "unlink", "fsync", "symlink", "mkdir", "rmdir", "ftruncate")


def count_calls(log: str, kill_at: int) -> None:
    """List this process's calls that change the file system, and kill it before one of them."""
    process, number = os.getpid(), 0

    def counted(name: str, call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal number
            if os.getpid() == process:
                number += 1
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"{number} {name} {arguments}\n")
                if number == kill_at:
                    os.kill(process, signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for name in _CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def work(rank: int, run: dict[str, Any]) -> int:
    """Run `mixcn` as one rank. Returns: its exit code."""
    if run["ranks"] > 1:  # Lightning uses the group that is there, which meets through a file instead of a port
        os.environ["LOCAL_RANK"] = str(rank)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{run['log']}.meet", rank=rank, world_size=run["ranks"]
        )
    if run["kill_at"] >= 0:
        count_calls(f"{run['log']}.calls", run["kill_at"])
    return main(run["arguments"])


def lead(run: dict[str, Any]) -> None:
    """Run all ranks, write their process ids and exit codes to files, and exit.

    Args:
        run: ``ranks``, ``folder`` to work in, ``arguments`` of `mixcn`, ``kill_at`` (see `count_calls`; -1 counts
            nothing), and ``log``, the file for what they print; the process ids are in the same with ``.pids``, the
            exit codes with ``.codes``, the calls with ``.calls``.
    """
    os.setsid()
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
        process = os.fork()
        if process == 0:
            lead(run)
        print(process, flush=True)
        os.waitpid(process, 0)
        codes = Path(f"{run['log']}.codes")
        print(codes.read_text() if codes.exists() else "[]", flush=True)


if __name__ == "__main__":
    serve()
