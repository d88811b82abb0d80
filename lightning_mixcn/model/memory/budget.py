"""Find out how much memory there is, and the least recomputation with which a run fits into it."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.causal_lm import base_of

from .plan import MemoryPlan, Run, plan_memory

# Of a device, for what no plan knows: the driver's context and libraries, pieces between blocks, a plan's own error.
RESERVE = 0.08
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def usable_bytes(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that this process can have in all: those it has now, and those that are free.

    Args:
        device: A GPU, or the CPU for the host's memory.
        processes: Number of processes that share the host's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device)
    usable: int = psutil.virtual_memory().available // processes + psutil.Process().memory_info().rss
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return usable if limit == "max" else min(usable, int(limit) // processes)


def fitting_modes(model: nn.Module, run: Run, budget: int | Literal["auto"], usable: int) -> list[str]:
    """Keep the experts' products of as many layers as fit (``selective``); the others run again in backward (``full``).

    The last layers keep theirs: backward frees them before it runs an earlier layer again. The very last one always
    does, since backward would begin by computing them again.

    Args:
        model: As in `plan_memory`.
        run: Its ``modes`` are not looked at.
        budget: Bytes for what is kept for backward and what a moment of the step needs beside it; ``auto`` is what
            ``usable`` leaves after parameters, gradients and optimizer states, less `RESERVE`.
        usable: Bytes of the device.

    Returns:
        A mode for each layer.

    Raises:
        ValueError: not even ``full`` in all layers but the last one fits.
    """
    layers = base_of(model).config.num_hidden_layers

    def modes(kept: int) -> list[str]:
        return ["full"] * (layers - kept) + ["selective"] * kept

    def missing(kept: int) -> int:
        plan = plan_memory(model, replace(run, modes=modes(kept)))
        if budget == "auto":
            return plan.peak - int((1 - RESERVE) * usable)
        return activation_bytes(plan) - budget

    fits, too_many = 1, layers + 1
    if (excess := missing(1)) > 0:
        there = f"{(1 - RESERVE) * usable / 1e9:.2f} GB of the device" if budget == "auto" else f"{budget / 1e9:.2f} GB"
        raise UserError(
            f"`activation_memory={budget!r}`: even with all layers but one computed again a micro-batch of "
            f"{run.batch.rows} x {run.batch.length} tokens needs {excess / 1e9:.2f} GB more than {there}. Lower "
            "`data.init_args.micro_batch_size`, or replace it by `activation_checkpointing: offload`"
        )
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if missing(middle) <= 0 else (fits, middle)
    return modes(fits)


def activation_bytes(plan: MemoryPlan) -> int:
    """Return the most bytes that activations and a moment's workspace take together."""
    return max(moment.activations + moment.workspace for moment in plan.moments if moment.name != "update")
