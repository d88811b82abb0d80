"""Several files unpacked at once, each by a process of its own that knows nothing of the one that waits for it.

The processes run a fresh interpreter instead of `multiprocessing`'s, which would import the caller's script again: that
breaks scripts without an `if __name__ == "__main__"`, and loads their libraries once more.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO

from tqdm.auto import tqdm

from lightning_mixcn.text.byte_streams import OnRead
from lightning_mixcn.text.files import identify
from lightning_mixcn.text.sources import SourceFile
from lightning_mixcn.text.stores import BadRecordPolicy, TextStore
from lightning_mixcn.text.unpacking import find_store, unpack

MAX_PROCESSES = 4
# A process takes some tenths of a second to start; meanwhile one reads this much.
MIN_PARALLEL_BYTES = 8 << 20
_PROGRAM = "from lightning_mixcn.text.unpacking_processes import serve; serve()"


def unpack_all(files: Sequence[SourceFile], on_bad_record: BadRecordPolicy, name: str) -> list[TextStore]:
    """Get the stores of files, and make those that are missing, with a bar of progress on a terminal.

    Args:
        files: The files.
        on_bad_record: Whether a bad record is an error, or left out and counted.
        name: Name of their source, for the bar.

    Returns:
        One store a file.

    Raises:
        ValueError: A file is damaged.
        OSError: A file cannot be read, or the cache folder cannot be written.
    """
    stores = [find_store(file, on_bad_record) for file in files]
    missing = [index for index, store in enumerate(stores) if store is None]
    if missing:
        sizes = [int(identify(files[index].path)["size"]) for index in missing]
        hidden = None if is_first_rank() else True
        with tqdm(
            total=sum(sizes), unit="B", unit_scale=True, desc=f"unpacking {name}", leave=False, disable=hidden
        ) as bar:
            todo = [files[index] for index in missing]
            made = _unpack_missing(todo, sizes, on_bad_record, bar)
        for index, store in zip(missing, made, strict=True):
            stores[index] = store
    return [store for store in stores if store is not None]


def is_first_rank() -> bool:
    """Whether this process is the one that talks, among those that a launcher started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _unpack_missing(
    files: list[SourceFile], sizes: list[int], on_bad_record: BadRecordPolicy, bar: tqdm[None]
) -> list[TextStore]:
    lock = threading.Lock()

    def advance(num_bytes: int) -> None:
        with lock:
            bar.update(num_bytes)

    # The files of `memory://` are in this process alone.
    here = any("memory:" in str(file.path) for file in files)
    processes = min(MAX_PROCESSES, os.cpu_count() or 1, len(files))
    if here or processes < 2 or sum(sizes) < MIN_PARALLEL_BYTES:
        return [unpack(file, on_bad_record, advance) for file in files]
    idle = list[_Process]()

    def work(file: SourceFile) -> TextStore:
        with lock:
            process = idle.pop() if idle else None
        process = process or _Process()
        started.append(process)
        store = process.unpack(file, on_bad_record, advance)
        with lock:
            idle.append(process)
        return store

    started = list[_Process]()
    with _ending(started), ThreadPoolExecutor(processes) as threads:
        futures = [threads.submit(work, file) for file in files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.end()
            raise


@contextmanager
def _ending(processes: list[_Process]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.end()


class _Process:
    """A process that unpacks one file after another."""

    def __init__(self) -> None:
        path = os.pathsep.join(part for part in sys.path if part)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def unpack(self, file: SourceFile, on_bad_record: BadRecordPolicy, on_read: OnRead) -> TextStore:
        """Have a file unpacked; errors are raised here."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            pickle.dump((file, on_bad_record), requests)
            requests.flush()
            while isinstance(answer := pickle.load(answers), int):
                on_read(answer)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"The process that unpacked `{file.path}` ended with {self._process.wait()}. The file may be damaged, "
                "or the memory too small: unpack it alone to see, or get it again"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, TextStore)
        return answer

    def end(self) -> None:
        """End the process, also in the middle of a file: a store that is not complete is no store."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):
                    pipe.close()


def serve() -> None:
    """Unpack the files that come on standard input until it ends; answers go to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits ends this process
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints does not come between the answers

    def answer(content: int | Exception | TextStore) -> None:
        pickle.dump(content, answers)
        answers.flush()

    while True:
        try:
            file, on_bad_record = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer(unpack(file, on_bad_record, answer))
        except (ValueError, OSError) as error:
            # A driver's own exceptions may not survive being pickled.
            is_known = type(error).__module__.split(".")[0] in ("builtins", "lightning_mixcn")
            answer(error if is_known else ValueError(str(error)))
