"""What all stages share: device, sizes, time, and the figures of earlier stages."""

import argparse
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from gpu_stages.running import read_figures
from random_base import config_of, random_model

PRESET, RANK = "full-8x7b", 64
# Without a GPU a stage is only tried: sizes that are not given are these, and rows are as many times shorter.
CPU_SIZES = {"layers": 1, "hidden": 256, "intermediate": 512}
CPU_SHORTER = 256
_PATH_VARIABLE = "MIXCN_EXPERT_PATH"


@dataclass(frozen=True)
class Settings:
    """Settings of a stage.

    Args:
        options: The command line of gpu_all.py.
        device: ``cuda`` or ``cpu``.
        started: Monotonic time at which the stage began.
    """

    options: argparse.Namespace
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        """Tell whether figures mean anything."""
        return self.device == "cuda"

    @cached_property
    def config(self) -> Any:
        """Sizes of the random model."""
        given = {name: getattr(self.options, name) for name in CPU_SIZES}
        sizes = given if self.on_gpu else {name: size or CPU_SIZES[name] for name, size in given.items()}
        return config_of(
            PRESET,
            num_hidden_layers=sizes["layers"],
            hidden_size=sizes["hidden"],
            width=sizes["intermediate"],
        )

    def tokens(self, count: int) -> int:
        """Return a number of tokens: as it is on a GPU, smaller on a CPU."""
        return count if self.on_gpu else max(4, count // CPU_SHORTER)

    def rounds(self, count: int) -> int:
        """Return a number of repetitions: as it is on a GPU, one on a CPU."""
        return count if self.on_gpu else min(count, 1)

    def left(self) -> float:
        """Return the seconds until the stage is killed."""
        return self.options.seconds - (time.monotonic() - self.started)

    def figures_of(self, stage: str) -> dict[str, Any]:
        """Return the figures of an earlier stage; none if it left none."""
        found = read_figures(self.options.out / "gpu.json")["stages"].get(stage, {}).get("figures", {})
        return dict(found)

    def model(self, lora: Any) -> Any:
        """Draw the model on the device, and say how long it took."""
        start = time.monotonic()
        model = random_model(self.config, lora, torch.device(self.device))
        synchronize(self.device)
        layers, seconds = self.config.num_hidden_layers, time.monotonic() - start
        print(f"  {layers} layers drawn and quantised on {self.device} in {seconds:.1f} s", flush=True)
        return model


def with_path(path: str | None) -> None:
    """Let the expert block take a path, or with ``None`` the one that it chooses."""
    os.environ.pop(_PATH_VARIABLE, None)
    if path is not None:
        os.environ[_PATH_VARIABLE] = path


def synchronize(device: str) -> None:
    """Wait until all is computed."""
    if device == "cuda":
        torch.cuda.synchronize()
