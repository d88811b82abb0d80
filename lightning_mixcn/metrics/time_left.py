"""How long a run will still take."""

from collections.abc import Callable
from time import perf_counter


class TimeLeft:
    """Estimates from all that a run has spent so far: validation, checkpoints and samples come again, too.

    Args:
        step: Steps done when the clock starts, not 0 in a resumed run.
        now: Clock in seconds.

    >>> ticks = iter([100.0, 106.0])
    >>> TimeLeft(step=10, now=lambda: next(ticks)).seconds(step=13, steps=20)
    14.0
    """

    def __init__(self, step: int = 0, now: Callable[[], float] = perf_counter) -> None:
        """Start."""
        self._first, self._now, self._started = step, now, now()

    def seconds(self, step: int, steps: int) -> float | None:
        """Seconds from now on.

        Args:
            step: Steps done.
            steps: Steps of the whole run; below 0 it has no end.

        Returns:
            ``None`` where nothing is known: before the first step, and without an end.
        """
        if step <= self._first or steps < 0:
            return None
        return (self._now() - self._started) / (step - self._first) * max(0, steps - step)
