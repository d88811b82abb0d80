"""What every benchmark writes beside its figures: where and with what they were measured."""

import json
import platform
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")


def processor() -> str:
    """The model name of the GPU, or of the CPU with its core count and threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit measured, ``+`` when the tree had changes."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` with device, versions and commit."""
    RESULTS.mkdir(exist_ok=True)
    origin = {"device": processor(), "commit": commit(), "versions": {name: version(name) for name in PACKAGES}}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(origin | figures, indent=2) + "\n")
    return path
