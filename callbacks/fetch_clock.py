"""Seconds in which training waits for its next batch."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

from lightning.pytorch.profilers import Profiler

# Lightning 2.6 tells the trainer's profiler of each call to the training loader by a name that ends so.
_FETCH = "].train_dataloader_next"


class FetchClock(Profiler):
    """Stands before a trainer's profiler and adds up the time between the loop's asking for a batch and getting it.

    That is where Lightning's own profilers measure: no validation, checkpoint, log or copy to the device is in it. The
    batch that Lightning fetches before the first step, while workers start, is not counted.

    Args:
        profiler: The trainer's; it is told everything, too.
        now: Clock in seconds.
    """

    # `Any`: the command line offers every Profiler wherever one is asked for, so this class inside itself without end.
    def __init__(self, profiler: Any, now: Callable[[], float] = perf_counter) -> None:
        super().__init__()
        self.profiler: Profiler = profiler
        self._now = now
        self._asked = 0.0
        self._seconds = 0.0

    def start(self, action_name: str) -> None:
        """An action begins."""
        self.profiler.start(action_name)
        if action_name.endswith(_FETCH):
            self._asked = self._now()

    def stop(self, action_name: str) -> None:
        """An action has ended."""
        if action_name.endswith(_FETCH):
            self._seconds += self._now() - self._asked
        self.profiler.stop(action_name)

    def summary(self) -> str:
        """What the trainer's profiler has to report."""
        return self.profiler.summary()

    def take(self) -> float:
        """Seconds waited since this was last called."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
