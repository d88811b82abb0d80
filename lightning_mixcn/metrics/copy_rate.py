"""How fast a device reads and writes its memory."""

from functools import cache
from time import perf_counter

import torch

_COPY_SECONDS, _COPY_AT_LEAST, _COPY_AT_MOST = 0.2, 3, 200


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds: the best of several, once in a process.

    Args:
        device: Any; other work on it lowers the result.
    """
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best, end = torch.empty_like(source), float("inf"), perf_counter() + _COPY_SECONDS
    for repetition in range(_COPY_AT_MOST):
        start = perf_counter()
        target.copy_(source)
        target[0].item()  # waits for the device
        now = perf_counter()
        if repetition:  # the first one touches new pages
            best = min(best, now - start)
        if now > end and repetition >= _COPY_AT_LEAST:
            break
    return 2 * size / best
