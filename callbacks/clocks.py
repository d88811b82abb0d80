"""Seconds in the phases of a training step, on the device that runs them."""

from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler


class PhaseClock:
    """Adds up the time between marks.

    On CUDA a mark is an event in the stream, and nothing waits for it until the sums are asked for: a phase then lasts
    from when the device has reached its mark until it has reached the next one, the host's delays included.

    Args:
        device: Where the phases run.
        now: Clock of the host in seconds, for any device but CUDA.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = perf_counter) -> None:
        self._device, self._now = device, now
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds of each phase that has ended since this was last called; on CUDA waits for the last mark."""
        if self._device.type == "cuda" and self._marks:
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
        self._marks = self._marks[-1:]
        return dict(seconds)


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
