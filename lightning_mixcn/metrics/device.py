"""Peak rates of a device: floating point operations and copied bytes a second."""

import re
from functools import cache
from time import perf_counter
from typing import NamedTuple

import torch

# Dense products in bfloat16 or float16 that are summed in float32, in teraflops per second, from NVIDIA's data sheets
# (which from Hopper on state twice as much, with sparsity) and for GeForce from the whitepapers of GA102, AD102, GB202.
# The first pattern found in the device's name counts.
_TERAFLOPS = {
    r"\bB200\b": 2250.0,
    r"\bH200 NVL\b": 835.5,
    r"\b(GH200|H200)\b": 989.4,
    r"\bH100 PCIe\b": 756.5,
    r"\bH100 NVL\b": 835.5,
    r"\bH(100|800)\b": 989.4,
    r"\bH20\b": 148.0,
    r"\bA(100|800)\b": 312.0,
    r"\bL40S\b": 362.05,
    r"\bL40\b": 181.05,
    r"\bL4\b": 121.0,
    r"\bA40\b": 149.7,
    r"\bRTX A6000\b": 154.8,
    r"\bA10\b": 125.0,
    r"\bRTX 5090\b": 209.5,
    r"\bRTX 4090\b": 165.2,
    r"\bRTX 3090\b(?! Ti)": 71.0,
}


class Card(NamedTuple):
    """A GPU as its maker's data sheet states it.

    Args:
        name: Name, as its driver calls it.
        bytes: Memory; drivers report up to 7 % more, and take some of it.
        bytes_per_second: Rate of its memory, reads and writes together.
    """

    name: str
    bytes: int
    bytes_per_second: float


CARDS = {
    "b200-180gb": Card("B200", 180 * 10**9, 8.0e12),
    "h200-141gb": Card("H200", 141 * 10**9, 4.8e12),
    "h100-80gb": Card("H100 80GB HBM3", 80 * 10**9, 3.35e12),
    "h100-nvl-94gb": Card("H100 NVL", 94 * 10**9, 3.9e12),
    "h100-pcie-80gb": Card("H100 PCIe", 80 * 10**9, 2.0e12),
    "a100-80gb": Card("A100-SXM4-80GB", 80 * 10**9, 2.039e12),
    "a100-40gb": Card("A100-SXM4-40GB", 40 * 10**9, 1.555e12),
    "l40s-48gb": Card("L40S", 48 * 10**9, 0.864e12),
    "rtx-a6000-48gb": Card("RTX A6000", 48 * 10**9, 0.768e12),
    "a40-48gb": Card("A40", 48 * 10**9, 0.696e12),
    "rtx-5090-32gb": Card("RTX 5090", 32 * 10**9, 1.792e12),
    "rtx-4090-24gb": Card("RTX 4090", 24 * 10**9, 1.008e12),
    "rtx-3090-24gb": Card("RTX 3090", 24 * 10**9, 0.936e12),
    "a10-24gb": Card("A10", 24 * 10**9, 0.6e12),
    "l4-24gb": Card("L4", 24 * 10**9, 0.3e12),
}
# Slower chips, or parts of one, under the same names.
_OTHERS = re.compile(r"\b(Laptop|Max-Q|MIG|D)\b")
_SECONDS, _AT_LEAST, _AT_MOST = 0.5, 3, 200


class PeakRate(NamedTuple):
    """A device's peak.

    Args:
        flops_per_second: Floating point operations a second.
        measured: True for the rate of large products on this device, false for the maker's figure.
    """

    flops_per_second: float
    measured: bool


def peak_rate(device: torch.device, dtype: torch.dtype) -> PeakRate:
    """Look up a device's peak, or measure it for half a second, once in a process, where it is not known.

    Args:
        device: Any; a GPU's name is looked up for 16-bit types. float32 is measured, as `torch` is set to compute it.
        dtype: Type of the products' factors.

    >>> peak_rate(torch.device("cpu"), torch.float32).measured
    True
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        stated = stated_peak(torch.cuda.get_device_name(device))
        if stated is not None:
            return PeakRate(stated, False)
    return PeakRate(_measure(device, dtype), True)


def stated_peak(name: str) -> float | None:
    """Return the maker's floating point operations a second in 16 bits; ``None`` for a device not known here.

    >>> stated_peak("NVIDIA H100 80GB HBM3")
    989400000000000.0
    """
    if _OTHERS.search(name):
        return None
    return next((rate * 1e12 for pattern, rate in _TERAFLOPS.items() if re.search(pattern, name)), None)


@cache
def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate of several square products; other work on the device lowers it."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    result, best = torch.empty_like(a), float("inf")
    end = perf_counter() + _SECONDS
    for repetition in range(_AT_MOST):
        start = perf_counter()
        torch.mm(a, b, out=result)
        result[0, 0].item()  # waits for the device
        now = perf_counter()
        if repetition:  # the first one makes kernels
            best = min(best, now - start)
        if now > end and repetition >= _AT_LEAST:
            break
    return 2 * size**3 / best


_COPY_SECONDS, _COPY_AT_LEAST, _COPY_AT_MOST = 0.2, 3, 200


@cache
def copy_rate(device: torch.device) -> float:
    """Return the bytes a second that a copy outside the caches reads and writes: the best of several, measured once.

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
