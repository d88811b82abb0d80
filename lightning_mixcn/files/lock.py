"""Keep an output to one process at a time, by a lock of the system that ends with the process."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_mixcn.errors import InUseError

_LOGGER = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
WAIT = "Wait for its end, or choose another output"

_held: dict[Path, int] = {}  # by lock file, its descriptor
_warned: set[Path] = set()


def lock_path(out: Path) -> Path:
    """Return the hidden file whose lock is an output's: beside it, but in the top folder of a file system.

    What such a folder lies in is another file system, and often cannot be written.
    """
    name = f".{out.name}.lock"
    return out / name if os.path.ismount(out) else out.with_name(name)


@contextmanager
def locked(out: Path, shown: str = "", advice: str = WAIT) -> Iterator[None]:
    """Hold an output's lock; a process that holds it already goes on.

    It is flock(2)'s: it ends with the process however that ends, and NFS passes it on to other machines. A file with
    a process id would outlive a kill, and say nothing of another machine or container. Not `filelock`: its lock file
    cannot name the process that holds it, and a child that is forked would hold the lock beyond its parent's end.

    Args:
        out: File or folder; its folder is made if need be, and removed again if it stays empty.
        shown: What the error calls it; its path where this is empty.
        advice: What the error says to do.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written.
    """
    path = lock_path(out.absolute())
    if path in _held:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]  # the deepest one first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _held[path] = _acquire(path, shown or repr(str(out)), advice)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock ends: what is there then is another process's
            os.close(_held.pop(path))
    finally:
        for folder in made:
            with suppress(OSError):  # it has been filled, or removed
                folder.rmdir()


def _acquire(path: Path, shown: str, advice: str) -> int:
    """Return the descriptor of a locked file that has this name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InUseError(f"{shown} is being written by {holder}. {advice}") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            _warn_once(path.parent)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        os.close(descriptor)  # the process before removed the file after it was opened here


def _warn_once(folder: Path) -> None:
    if folder not in _warned:
        _warned.add(folder)
        _LOGGER.warning("%s is on a file system without locks: see that no second process writes there", folder)


def _forget() -> None:
    """Give up the copies that a forked process, such as a loader's worker, has of its parent's locks."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
