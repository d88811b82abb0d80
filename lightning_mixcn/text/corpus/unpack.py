"""Corpora of sources: their files are found in the cache folder, or unpacked there, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock
from tqdm.auto import tqdm

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.hub import cache_root
from lightning_mixcn.masking import without_secrets

from .formats import iterate_documents, refuse
from .listings import LeftOut, list_files
from .reading import DamagedFileError, OnRead, identify, ignore_progress
from .sources import AnySource, Source, SourceFile
from .store import (
    VERSION,
    BadRecordPolicy,
    Corpus,
    RecordTally,
    StoreCounts,
    TextStore,
    is_intact,
    naming_cache,
    read_store,
    write_store,
)

_logger = logging.getLogger(__name__)
# Longer than a file system's clock takes to tick: a file changed twice within a tick has one time.
_CLOCK_TICK_NS = 20_000_000
MAX_PROCESSES = 4
# One process reads this much while others start.
MIN_PARALLEL_BYTES = 8 << 20
# Spawned processes run a script again that has no `if __name__ == "__main__"`.
_START_METHOD = "fork" if sys.platform == "linux" else None
_CHECK_SECONDS = 1.0  # interval at which a process checks that the one that started it is alive
_BAR_SECONDS = 0.2


def read_corpus(source: AnySource, place: str = "sources[0]", *, on_bad_record: BadRecordPolicy = "error") -> Corpus:
    """Open the documents of a source; files that are not in the cache folder yet are unpacked there.

    The cache folder is `$MIXCN_CACHE`, or `lightning_mixcn` in `$XDG_CACHE_HOME` or `~/.cache`, and takes the size of
    the texts unpacked. Memory stays small, whatever the size of the files: only one record is held at a time. One line
    of the log says how many files were read, and what was left out and why.

    Args:
        source: Source of the files.
        place: Name of the source in the configuration, for errors.
        on_bad_record: `error` to stop at a record that is malformed, or has no valid text; `skip` to leave it out, and
            the rest of a damaged file too, with a warning.

    Returns:
        The documents.

    Raises:
        FileNotFoundError: A path matches no file.
        OSError: A file cannot be read, or the cache folder cannot be written.
        ValueError: A file is damaged, the files have no document at all, or no record has a key that the source's
            `columns` names.
    """
    if on_bad_record not in get_args(BadRecordPolicy):
        raise UserError(f"`on_bad_record={on_bad_record!r}`: expected one of {', '.join(get_args(BadRecordPolicy))}")
    left_out = LeftOut()
    stores = unpack_all(list_files(source, place, left_out), on_bad_record, source.name)
    corpus = Corpus(source, tuple(stores), on_bad_record)
    _check_columns(corpus, place)
    if not len(corpus):
        places = [place for store in stores for place in store.counts.bad_places]
        bad = f"{corpus.bad_records} bad records, the first: {places[0]}" if places else ""
        blank = f"{corpus.empty_records} records without text" if corpus.empty_records else ""
        but = f" but {' and '.join(filter(None, (blank, bad)))}" if bad or blank else ". Give files with text"
        raise UserError(f"`{place}.path={source.path!r}`: the {len(stores)} files have no document{but}")
    if is_first_rank():
        empty = corpus.empty_records
        without = f", {empty} records without text left out, too" if empty else ""
        left_out.tell(_logger, source.name, len(stores), f"; {len(corpus)} documents{without}", warn=empty > 0)
        _warn_of_bad_records(corpus)
    return corpus


def _check_columns(corpus: Corpus, place: str) -> None:
    """Refuse a column that no record has; that of a text is `text_key`, which every record must have."""
    if isinstance(corpus.source, Source):
        return
    first = next((store for store in corpus.stores if store.counts.keys), None)
    seen = {name for store in corpus.stores for name in store.counts.columns}
    for key, name in (corpus.source.columns or {}).items():
        if first is not None and name not in seen:
            raise UserError(
                f"`{place}.columns.{key}={name!r}`: no record has that key. Give one of those that the first record of "
                f"`{first.file}` has: {', '.join(map(repr, first.counts.keys))}"
            )


def _warn_of_bad_records(corpus: Corpus) -> None:
    for store in corpus.stores:
        counts = store.counts
        if counts.bad_records:
            _logger.warning(
                "`%s`: %d bad records were left out, %d documents are kept.%s The first: %s",
                store.file, counts.bad_records, len(store), _unread(counts), counts.bad_places[0],
            )  # fmt: skip


def _unread(counts: StoreCounts) -> str:
    """Say how much of a damaged file is lost: it is one bad record, however many were in the rest."""
    if not counts.damaged:
        return ""
    told = " The rest of the file was not read"
    if counts.unread_bytes:
        share = 100 * counts.unread_bytes / counts.file_bytes
        return f"{told}: {counts.unread_bytes:,} of {counts.file_bytes:,} bytes, {share:.3g} %."
    return f"{told}: it is cut off." if counts.file_bytes else f"{told}."


def is_first_rank() -> bool:
    """Tell whether this process is the one that reports, among those that a launcher started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _is_first_on_machine() -> bool:
    """Tell whether this process prepares the cache folder of its machine, before the others read it."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID"))


def unpack_all(files: Sequence[SourceFile], on_bad_record: BadRecordPolicy, name: str) -> list[TextStore]:
    """Get the stores of files, and make those that are missing, with a bar of progress on a terminal.

    Args:
        files: Files of one source.
        on_bad_record: `error` to raise at a bad record, `skip` to leave it out and count it.
        name: Name of the source, for the bar.

    Returns:
        One store a file.

    Raises:
        ValueError: A file is damaged.
        OSError: A file cannot be read, or the cache folder cannot be written.
    """
    with ThreadPoolExecutor(MAX_PROCESSES) as pool:  # checksums and reads let other threads run
        stores = dict(zip(files, pool.map(partial(find_store, on_bad_record=on_bad_record), files), strict=True))
    missing = [file for file, store in stores.items() if store is None]
    if missing:
        size = sum(int(identify(file.path)["size"]) for file in missing)
        hidden = None if is_first_rank() else True
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"unpacking {name}", leave=False, disable=hidden) as bar:
            # The files of `memory://` are in this process alone, and a daemon may not start others.
            here = multiprocessing.current_process().daemon or any("memory:" in str(file.path) for file in missing)
            processes = min(MAX_PROCESSES, os.cpu_count() or 1, len(missing))
            if here or processes < 2 or size < MIN_PARALLEL_BYTES:
                made = [unpack(file, on_bad_record, bar.update) for file in missing]
            else:
                try:
                    made = _unpack_in_processes(missing, on_bad_record, bar, processes)
                except BaseException:
                    for file in missing:  # whose processes were ended in the middle of it
                        with _lock(folder := _folder_of(file, on_bad_record), wait=False) as is_locked:
                            if is_locked:
                                _remove_left(folder)
                    raise
        stores |= zip(missing, made, strict=True)
    return [store for store in stores.values() if store is not None]


def _unpack_in_processes(
    files: Sequence[SourceFile], on_bad_record: BadRecordPolicy, bar: tqdm[None], processes: int
) -> list[TextStore]:
    context = multiprocessing.get_context(_START_METHOD)
    read = context.Value("q", 0)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, _start_process, (read,)) as pool:
        futures = [pool.submit(_unpack_in_process, file, on_bad_record) for file in files]
        try:
            unfinished = set(futures)
            while unfinished:
                done, unfinished = wait(unfinished, _BAR_SECONDS, FIRST_EXCEPTION)
                bar.update(read.get_obj().value - bar.n)  # without the lock: a killed process may hold it
                for future in done:
                    future.result()
        except BaseException as error:
            # In the middle of a file, too: a store that is not complete is no store. The pool then ends by itself.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            if isinstance(error, BrokenProcessPool):
                ended = [future.done() and future.exception() is None for future in futures]
                lost = [f"`{file.path}`" for file, whole in zip(files, ended, strict=True) if not whole]
                raise UserError(
                    f"A process that unpacked {' or '.join(lost[:processes])} was killed. The memory may be too small, "
                    "or the file damaged: unpack it alone to see, or get it again"
                ) from error
            raise
    return [future.result() for future in futures]


_bytes_read: Any = None  # shared with the process that started this one


def _start_process(bytes_read: Any) -> None:
    global _bytes_read
    _bytes_read = bytes_read
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits ends this process
    end_with_parent()


def _unpack_in_process(file: SourceFile, on_bad_record: BadRecordPolicy) -> TextStore:
    def advance(num_bytes: int) -> None:
        with _bytes_read.get_lock():
            _bytes_read.value += num_bytes

    try:
        return unpack(file, on_bad_record, advance)
    except (ValueError, OSError) as error:
        # A driver's own exceptions may not survive being pickled.
        if type(error).__module__.split(".")[0] in ("builtins", "lightning_mixcn"):
            raise
        raise UserError(str(error)) from None


def end_with_parent() -> None:
    """End this process once the one that started it is gone, killed perhaps; nothing else would end a waiting one."""
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_CHECK_SECONDS)
    os._exit(1)


def find_store(file: SourceFile, on_bad_record: BadRecordPolicy) -> TextStore | None:
    """Find the store of a file in the cache folder.

    Args:
        file: File of a source.
        on_bad_record: Policy for bad records: the store depends on it.

    Returns:
        The store, or None if there is none, it is damaged, or the file has changed since. Its contents are compared
        with their checksums in the process that prepares the machine's cache folder, once.
    """
    return _find(_folder_of(file, on_bad_record), file, _made_from(file, on_bad_record))


def unpack(file: SourceFile, on_bad_record: BadRecordPolicy, on_read: OnRead = ignore_progress) -> TextStore:
    """Get the store of a file, which is made if there is none yet.

    Of several processes that unpack one file at once, one does and the others wait, where the file system has locks;
    elsewhere each does, and the first to end wins.

    Args:
        file: File to unpack.
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
            _remove_left(folder)
        scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
        try:
            counts = _write(scratch, file, on_bad_record, made_from, on_read)
            if _made_from(file, on_bad_record) != made_from:
                raise UserError(f"`{file.path}` was changed while it was read. Start again once it is complete")
            with naming_cache(folder):
                _publish(scratch, folder, made_from)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return TextStore(str(folder), without_secrets(file.path), counts)


def _remove_left(folder: Path) -> None:
    """Remove what processes left that were killed; whoever calls it holds the lock, so nobody else is at it."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(
    scratch: Path, file: SourceFile, on_bad_record: BadRecordPolicy, made_from: dict[str, Any], on_read: OnRead
) -> StoreCounts:
    tally, read = RecordTally(file_bytes=int(made_from["identity"]["size"])), 0

    def advance(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes
        on_read(num_bytes)

    def count(error: ValueError) -> None:
        tally.add(error)
        if isinstance(error, DamagedFileError):
            share = error.unread_share
            rest = tally.file_bytes - read if share is None else round(share * tally.file_bytes)
            tally.damaged, tally.unread_bytes = True, max(rest, 0)

    documents = iterate_documents(file, refuse if on_bad_record == "error" else count, advance, tally)
    return write_store(scratch, documents, made_from, tally)


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
        if there is not None and there[0] == made_from and is_intact(folder):
            return  # another process was first
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
        with suppress(FileNotFoundError):
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _find(folder: Path, file: SourceFile, made_from: dict[str, Any]) -> TextStore | None:
    there = read_store(folder)
    if there is None or there[0] != made_from:
        return None
    if _is_first_on_machine() and not is_intact(folder):
        _logger.warning("The unpacked texts of `%s` were altered in `%s`: they are unpacked again", file.path, folder)
        return None
    return TextStore(str(folder), without_secrets(file.path), there[1])


def _made_from(file: SourceFile, on_bad_record: BadRecordPolicy) -> dict[str, Any]:
    return {"version": VERSION, **without_secrets(_setting(file, on_bad_record)), "identity": identify(file.path)}


def _settled(file: SourceFile, on_bad_record: BadRecordPolicy) -> dict[str, Any]:
    """Return the same, once any further change of the file shows in its time."""
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
        "max_document_bytes": file.max_document_bytes,
        **({"records": file.records} if file.records else {}),
        # As read back from JSON, or no store would ever be found again.
        **({"roles": dict(file.roles)} if file.roles else {}),
        **({"columns": [list(pair) for pair in file.columns]} if file.columns else {}),
    }


def _folder_of(file: SourceFile, on_bad_record: BadRecordPolicy) -> Path:
    setting = json.dumps(_setting(file, on_bad_record), sort_keys=True)
    return cache_folder() / hashlib.blake2b(setting.encode(), digest_size=16).hexdigest()


@contextmanager
def _lock(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the right to make a store; False where the file system has no locks. It ends with the process."""
    with naming_cache(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    # A soft lock, which is a file, would stay when its process is killed.
    lock = FileLock(folder.with_suffix(".lock"), fallback_to_soft=False)
    with suppress(OSError):
        lock.acquire(blocking=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def cache_folder() -> Path:
    """Get the folder of unpacked texts: in `$MIXCN_CACHE`, `$XDG_CACHE_HOME/lightning_mixcn` or below `~/.cache`."""
    return cache_root() / "text"
