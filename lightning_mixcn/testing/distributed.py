"""Functions run by several ranks on this machine, connected by gloo, or on GPUs by NCCL."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from lightning_mixcn.files.atomic import new_file

Result = TypeVar("Result")
# Imported once by a server that then forks each rank: the imports take seconds.
_PRELOADED = ["lightning_mixcn.callbacks", "lightning_mixcn.data", "lightning_mixcn.modules"]


def run_distributed(
    function: Callable[..., Result],
    ranks: int,
    *arguments: Any,
    timeout_seconds: float = 300.0,
    backend: Literal["gloo", "nccl"] = "gloo",
) -> list[Result]:
    """Call a function in several processes at once, as ranks of one group; a Trainer in it uses this group.

    Args:
        function: Function of a module that can be imported; called with the arguments.
        ranks: Number of processes.
        arguments: Arguments, which can be pickled.
        timeout_seconds: After this long, ranks that have not ended are killed.
        backend: ``nccl``: each rank has the GPU of its number.

    Returns:
        What each rank's call returned.

    Raises:
        RuntimeError: a rank failed, ended or took too long; has the traceback of each that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context, processes = _context(backend), list[BaseProcess]()
        for rank in range(ranks):
            call = (folder, rank, ranks, backend, function, arguments)
            processes.append(context.Process(target=_run_rank, args=call))
            processes[-1].start()
        for process in processes:
            process.join(timeout_seconds)
        for process in processes:
            process.kill()
            process.join()
        outcomes = [_outcome(folder, rank, process.exitcode) for rank, process in enumerate(processes)]
    if failures := [str(failure) for succeeded, failure in outcomes if not succeeded]:
        raise RuntimeError("\n".join(failures))
    return [result for _, result in outcomes]


def _context(backend: str) -> ForkServerContext | SpawnContext:
    """Return how processes start; one that was forked from where CUDA was asked for has no CUDA."""
    if backend == "nccl":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run_rank(
    folder: Path, rank: int, ranks: int, backend: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # LOCAL_RANK also tells Lightning that the processes are there already.
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    try:
        # Ranks meet through a file instead of a port, which another process might take.
        meeting = f"file://{folder / 'meeting'}"
        device = torch.device("cuda", rank) if backend == "nccl" else None
        if device is not None:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            backend, init_method=meeting, rank=rank, world_size=ranks, device_id=device
        )
        outcome = True, function(*arguments)
        torch.distributed.destroy_process_group()
    except BaseException:
        outcome = False, f"rank {rank}: {traceback.format_exc()}"
    with new_file(folder / f"{rank}.pickle") as unfinished:
        unfinished.write_bytes(pickle.dumps(outcome))


def _outcome(folder: Path, rank: int, exit_code: int | None) -> tuple[bool, Any]:
    file = folder / f"{rank}.pickle"
    if not file.exists():
        return False, f"rank {rank} ended with exit code {exit_code} and gave nothing"
    outcome: tuple[bool, Any] = pickle.loads(file.read_bytes())
    return outcome
