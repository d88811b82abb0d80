"""End a command on a signal by an exception, so that nothing half written is left."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Signalled(BaseException):
    """Report the signal that ends the command.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Signalled` on SIGTERM and SIGHUP; what ignores or handles one already keeps it, such as nohup.

    Training has handlers of its own, which save first. Python allows handlers in the main thread only.
    """
    process = os.getpid()

    def receive(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked one, such as a pool's, dies as ever
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the cleaning up
        raise Signalled(number)

    is_main = threading.current_thread() is threading.main_thread()
    taken = [number for number in _SIGNALS if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
