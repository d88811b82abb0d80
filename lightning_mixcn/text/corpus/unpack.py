"""Stores of files: found in the cache folder, or made there so that a store is whole or not there at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from lightning_mixcn.errors import MissingFileError, UserError

from .formats import RecordTally, iterate_documents, refuse
from .reading import (
    DamagedFileError,
    OnRead,
    identify,
    ignore_progress,
)
from .sources import SourceFile
from .store import (
    VERSION,
    BadRecordPolicy,
    Losses,
    StoreWriter,
    TextStore,
    read_store,
)

# Longer than a file system's clock takes to tick: a file changed twice within a tick has one time.
_CLOCK_TICK_NS = 20_000_000


def cache_folder() -> Path:
    """Get the folder of unpacked texts: in `$MIXCN_CACHE`, `$XDG_CACHE_HOME/lightning_mixcn` or below `~/.cache`."""
    if own := os.environ.get("MIXCN_CACHE"):
        return Path(os.path.expanduser(own)).absolute() / "text"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches).absolute() / "lightning_mixcn" / "text"


def find_store(file: SourceFile, on_bad_record: BadRecordPolicy) -> TextStore | None:
    """Find the store of a file in the cache folder.

    Args:
        file: The file.
        on_bad_record: Policy for bad records: the store depends on it.

    Returns:
        The store, or None if there is none, it is damaged, or the file has changed since.
    """
    return _find(_folder_of(file, on_bad_record), file, _made_from(file, on_bad_record))


def unpack(file: SourceFile, on_bad_record: BadRecordPolicy, on_read: OnRead = ignore_progress) -> TextStore:
    """Get the store of a file, which is made if there is none yet.

    Of several processes that unpack one file at once, one does and the others wait, where the file system has locks;
    elsewhere each does, and the first to end wins.

    Args:
        file: The file.
        on_bad_record: `error` to raise at a bad record, `skip` to leave it out and count it.
        on_read: Called with how many bytes of the file, as it is stored, were read since the last call.

    Returns:
        The store.

    Raises:
        ValueError: A file is damaged, or was changed while it was read.
        OSError: The file cannot be read, or the cache folder cannot be written.
    """
    folder = _folder_of(file, on_bad_record)
    with _lock(folder) as is_locked:
        made_from = _settled(file, on_bad_record)
        if (store := _find(folder, file, made_from)) is not None:
            return store
        if is_locked:
            # Nobody else is at it: these are left of processes that were killed.
            for left in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
        scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
        try:
            _write(scratch, file, on_bad_record, made_from, on_read)
            if _made_from(file, on_bad_record) != made_from:
                raise UserError(f"`{file.path}` was changed while it was read. Start again once it is complete")
            with _naming_cache(folder):
                _publish(scratch, folder, made_from)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    store = _find(folder, file, made_from)
    if store is None:
        raise MissingFileError(f"The unpacked texts of `{file.path}` in `{folder}` were removed at once. Start again")
    return store


def _write(
    scratch: Path, file: SourceFile, on_bad_record: BadRecordPolicy, made_from: dict[str, Any], on_read: OnRead
) -> None:
    losses, tally, read = Losses(file_bytes=int(made_from["identity"]["size"])), RecordTally(), 0

    def advance(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes
        on_read(num_bytes)

    def count(error: ValueError) -> None:
        losses.add(error)
        if isinstance(error, DamagedFileError):
            share = error.unread_share
            rest = losses.file_bytes - read if share is None else round(share * losses.file_bytes)
            losses.damaged, losses.unread_bytes = True, max(rest, 0)

    with _naming_cache(scratch):
        scratch.mkdir()
        writer = StoreWriter(scratch)
    # A full disk shows when a file is closed, too.
    with _naming_cache(scratch, only_space=True), writer:
        on_bad = refuse if on_bad_record == "error" else count
        for record, encoded in iterate_documents(file, on_bad, advance, tally):
            writer.append(record, encoded)
            if writer.is_full:
                with _naming_cache(scratch):
                    writer.flush()
        with _naming_cache(scratch):
            losses.empty_records, losses.columns = tally.empty, tuple(sorted(tally.columns))
            losses.keys = tally.keys if file.columns else ()
            writer.finish(made_from, losses)


def _publish(scratch: Path, folder: Path, made_from: dict[str, Any]) -> None:
    """Give a complete store its name, in place of one that is old or damaged."""
    while True:
        try:
            scratch.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        there = read_store(folder)
        if there is not None and there[0] == made_from:
            return  # another process was first
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
        with suppress(FileNotFoundError):
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _find(folder: Path, file: SourceFile, made_from: dict[str, Any]) -> TextStore | None:
    there = read_store(folder)
    return TextStore(str(folder), file.path, there[1]) if there is not None and there[0] == made_from else None


def _made_from(file: SourceFile, on_bad_record: BadRecordPolicy) -> dict[str, Any]:
    return {"version": VERSION, **_setting(file, on_bad_record), "identity": identify(file.path)}


def _settled(file: SourceFile, on_bad_record: BadRecordPolicy) -> dict[str, Any]:
    """The same, once any further change of the file shows in its time."""
    made_from = _made_from(file, on_bad_record)
    changed = made_from["identity"].get("mtime_ns", 0)
    if 0 <= time.time_ns() - changed < _CLOCK_TICK_NS:
        time.sleep(_CLOCK_TICK_NS / 1e9)
        made_from = _made_from(file, on_bad_record)
    return made_from


def _setting(file: SourceFile, on_bad_record: BadRecordPolicy) -> dict[str, Any]:
    path = str(file.path.absolute()) if isinstance(file.path, Path) else file.path
    return {
        "file": path,
        "format": file.format,
        "text_key": file.text_key,
        "document_unit": file.document_unit,
        "on_bad_record": on_bad_record,
        **({"records": file.records} if file.records else {}),
        # As read back from JSON, or no store would ever be found again.
        **({"roles": dict(file.roles)} if file.roles else {}),
        **({"columns": [list(pair) for pair in file.columns]} if file.columns else {}),
    }


def _folder_of(file: SourceFile, on_bad_record: BadRecordPolicy) -> Path:
    setting = json.dumps(_setting(file, on_bad_record), sort_keys=True)
    return cache_folder() / hashlib.blake2b(setting.encode(), digest_size=16).hexdigest()


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the right to make a store; False where the file system has no locks. It ends with the process."""
    with _naming_cache(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".lock").open("wb")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked


@contextmanager
def _naming_cache(folder: Path, *, only_space: bool = False) -> Iterator[None]:
    """Say of an error that it is the cache folder's, and what to do."""
    try:
        yield
    except OSError as error:
        named = "MIXCN_CACHE" in str(error)
        if named or (only_space and error.errno not in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise OSError(
            error.errno,
            f"The cache folder `{folder.parent}` of unpacked texts cannot be written: {error.strerror or error}. "
            "Set the environment variable MIXCN_CACHE to a folder that can, with room for all texts unpacked",
        ) from error


MAX_PROCESSES = 4
# A process takes some tenths of a second to start; meanwhile one reads this much.
MIN_PARALLEL_BYTES = 8 << 20
_PROGRAM = "from lightning_mixcn.text.corpus.unpack import serve; serve()"


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
            raise UserError(
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
            answer(error if is_known else UserError(str(error)))
