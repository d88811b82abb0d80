"""As many layers as fit keep their experts' products."""

from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig

from lightning_mixcn.model import build_mixtral
from lightning_mixcn.model.memory.budget import (
    RESERVE,
    activation_bytes,
    fitting_modes,
    usable_bytes,
)
from lightning_mixcn.model.memory.layer import MicroBatch
from lightning_mixcn.model.memory.optimizer import OptimizerMemory
from lightning_mixcn.model.memory.plan import Run, Sharing, plan_memory
from lightning_mixcn.testing import tiny_mixtral_config

LAYERS = 4


@pytest.fixture
def model() -> Any:
    config = tiny_mixtral_config(num_hidden_layers=LAYERS, hidden_size=128, intermediate_size=448)
    return build_mixtral(config, lora=LoraConfig(r=8, target_modules="all-linear"), device="meta")


@pytest.fixture
def run() -> Run:
    return Run(MicroBatch(2, 512), [], "cuda", True, OptimizerMemory(0, 0), Sharing())


@pytest.mark.parametrize("kept", range(1, LAYERS + 1))
def test_a_budget_is_used_and_kept(kept: int, model: Any, run: Run) -> None:
    modes = ["full"] * (LAYERS - kept) + ["selective"] * kept
    plan = plan_memory(model, replace(run, modes=modes))
    assert fitting_modes(model, run, activation_bytes(plan), usable=0) == modes
    enough = -(-plan.peak // (1 - RESERVE)) + 1
    assert fitting_modes(model, run, "auto", usable=int(enough)) == modes
    if kept > 1:
        assert fitting_modes(model, run, activation_bytes(plan) - 1, usable=0) == ["full", *modes[:-1]][:LAYERS]


def test_the_last_layer_costs_nothing(model: Any, run: Run) -> None:
    full, last = (plan_memory(model, replace(run, modes=["full"] * 3 + [mode])) for mode in ("full", "selective"))
    assert last.peak <= full.peak


def test_too_small(model: Any, run: Run) -> None:
    with pytest.raises(
        ValueError, match=r"`activation_memory=1000`: even with all layers but one .* 2 x 512 tokens needs"
    ):
        fitting_modes(model, run, 1000, usable=0)
    with pytest.raises(ValueError, match=r"`activation_memory='auto'`.*of the device. Lower"):
        fitting_modes(model, run, "auto", usable=1000)


def test_the_host_s_memory() -> None:
    assert 0 < usable_bytes(torch.device("cpu"), 2) < usable_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
