"""Seconds in the phases of a training step, on the device that runs them."""

from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch


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
