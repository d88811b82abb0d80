"""Wall time of optimizer steps, for throughput."""

import time
from collections.abc import Callable


class StepClock:
    """Time of each optimizer step: waiting for data, forward, backward, update; not validation, samples or checkpoints.

    Args:
        now: Clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Start."""
        self._now = now
        self._started = now()
        self._paused = self._started
        self._seconds: float | None = None

    def start(self) -> None:
        """A step begins."""
        self._started = self._now()
        self._seconds = None

    def pause(self) -> None:
        """What follows is not training."""
        self._paused = self._now()

    def resume(self) -> None:
        """Training goes on."""
        self._started += self._now() - self._paused

    def stop(self) -> None:
        """The step's update is done."""
        self._seconds = self._now() - self._started

    @property
    def seconds(self) -> float | None:
        """Seconds of the step that ended, or ``None`` while one is under way."""
        return self._seconds
