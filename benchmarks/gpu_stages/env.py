"""Stage 1: the card, its clocks and rates, versions, commit."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import record
import torch
from gpu_stages.running import Figures
from gpu_stages.settings import Settings
from limits import flops, timed

from lightning_mixcn.metrics.device import copy_rate

_PACKAGES = (*record.PACKAGES, "triton", "safetensors", "tokenizers")
_CLOCKS = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu",
    "utilization.gpu", "memory.used",
)  # fmt: skip


def run(settings: Settings, figures: Figures) -> None:
    """Record where this is measured; rates last, since they can fail."""
    figures |= {"device": record.processor(), "commit": record.commit(), "python": platform.python_version()}
    figures["versions"] = {name: _version(name) for name in _PACKAGES} | {"cuda": torch.version.cuda}
    host = {"cpus": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9, 1)}
    host["free_disk_gb"] = round(shutil.disk_usage(settings.options.out).free / 1e9, 1)
    figures |= {"host": host, "allocator": os.environ.get("PYTORCH_ALLOC_CONF")}
    if settings.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        figures |= {"capability": f"{properties.major}.{properties.minor}", "devices": torch.cuda.device_count()}
        figures |= {"multiprocessors": properties.multi_processor_count, "free_bytes": free, "memory_bytes": total}
        figures["clocks_before"] = clocks()
    print(f"  {figures['device']}, torch {torch.__version__}, commit {figures['commit']}", flush=True)
    figures.save()
    size = 8192 if settings.on_gpu else 512
    products = [((size, size, size), 8)]
    multiply = timed(products, settings.device)
    seconds = [multiply() for _ in range(6)][1:]
    figures["product_tflops_per_second"] = record.spread([flops(products) / value / 1e12 for value in seconds])
    figures["copied_gb_per_second"] = copy_rate(torch.device(settings.device)) / 1e9
    if settings.on_gpu:
        figures["clocks_after"] = clocks()
    rate, copied = figures["product_tflops_per_second"]["median"], figures["copied_gb_per_second"]
    print(f"  products of {size}³: {rate:.1f} TFLOP/s; a copy: {copied:.0f} GB/s read and written", flush=True)


def clocks() -> dict[str, str] | str:
    """Return what nvidia-smi says about the first card, or why it says nothing."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    return dict(zip(_CLOCKS, (value.strip() for value in done.stdout.strip().split(",")), strict=False))


def _version(name: str) -> Any:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
