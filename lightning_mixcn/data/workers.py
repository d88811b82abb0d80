"""Processes that make batches for a loader: their start, their errors, and their end."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

Message = TypeVar("Message")

# Messages a worker may be ahead: texts differ in length, and with two a worker often waited for another one's.
_PREFETCHED = 8
# Python 3.14 would import everything again in each worker, which takes ten seconds.
_FASTEST_START = "fork" if sys.platform == "linux" else None
# Between a worker's looks whether the training process lives.
_LOOK_SECONDS = 1.0
_PACKAGE = Path(__file__).resolve().parents[1]


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
        Exception: What a worker raised. From this package's own code it has the message that it had in the worker, and
            torch's with the worker's traceback as its cause.
    """
    loader: DataLoader[Message] = DataLoader(
        dataset,
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
        yield from messages
    except Exception as error:
        message = _message_of_worker(error)
        if message is None:
            raise
        raise type(error)(message) from error
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


def _message_of_worker(error: Exception) -> str | None:
    """Find the message of an error that a worker met, if this package raised it.

    torch hands it over as text: "Caught ValueError in DataLoader worker process 0.", the traceback, the message.
    """
    text = str(error)
    files = re.findall(r'^  File "(.+)", line \d+', text, flags=re.MULTILINE)
    messages = re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", text, flags=re.MULTILINE)
    raised_here = files and Path(files[-1]).resolve().is_relative_to(_PACKAGE)
    return messages[-1].strip() if raised_here and len(messages) > 1 else None


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
