"""Processes that make batches for a loader: their start, their errors, and their end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from lightning_mixcn.errors import UserError

Message = TypeVar("Message")

# Messages a worker may be ahead: texts differ in length, and with two a worker often waited for another one's.
_PREFETCHED = 8
# Python 3.14 would import everything again in each worker, which takes ten seconds.
_FASTEST_START = "fork" if sys.platform == "linux" else None
# Between a worker's looks whether the training process lives.
_LOOK_SECONDS = 1.0


def worker_messages(
    dataset: IterableDataset[Message], num_workers: int, start_method: str | None = None
) -> Iterator[Message]:
    """Iterate over what each worker sends, one message of each in turn; no worker outlives the iterator.

    Args:
        dataset: Asks `get_worker_info` which worker it is in.
        num_workers: Processes; 0 iterates in this one.
        start_method: How they start: `fork`, `spawn`, `forkserver`, or None for the fastest.

    Yields:
        Messages.

    Raises:
        UserError, OSError: Raised by a worker, with its traceback as a note.
        Exception: Another error of a worker, as torch hands it over.
    """
    loader: DataLoader[Message] = DataLoader(
        _ReportsFailures(dataset),
        batch_size=None,
        collate_fn=_identity,
        worker_init_fn=_live_as_long_as_the_run,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        multiprocessing_context=(start_method or _FASTEST_START) if num_workers else None,
    )
    others = set(active_children())
    messages: Any = None
    try:
        with _one_thread_in_workers():
            messages = iter(loader)
        for message in messages:
            if isinstance(message, _Failure):
                raise message.error
            yield message
    finally:
        if num_workers:
            _end(messages, set(active_children()) - others)


def _end(messages: Any, workers: set[BaseProcess]) -> None:
    """End the workers now.

    Left to the garbage collector they live as long as an error's traceback, and a process that exits sends them
    SIGTERM, which they ignore, and waits for them without end.

    Args:
        messages: torch's iterator over them, None if it was not made.
        workers: The processes.
    """
    if messages is not None:
        messages._shutdown_workers()  # torch has no public way
    for worker in workers:
        worker.kill()
        worker.join()


@dataclass(frozen=True)
class _Failure:
    """Carry an error of a worker to the training process: torch would hand over its text alone."""

    error: Exception


class _ReportsFailures(IterableDataset[Any]):
    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._dataset
        except (UserError, OSError) as error:
            error.add_note(traceback.format_exc())  # it is lost between processes
            yield _Failure(error)


def _identity(message: Any) -> Any:
    return message


def _live_as_long_as_the_run(worker: int) -> None:
    # SLURM signals every process of a job: workers have to live until the run has ended its step and saved.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    """End this process once its parent is gone, killed perhaps.

    torch's workers see that, too, but then wait until what they have sent is read, which nobody does any more.
    """
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


@contextmanager
def _one_thread_in_workers() -> Iterator[None]:
    """Forked tokenizers must not use the threads of their parent; what the child inherits says so without a warning."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
