"""States of steps without memory against those of real ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from torch import nn
from torch.optim import Optimizer

from lightning_mixcn.model.memory.optimizer import MemoryTracker, optimizer_memory

SHAPES = [(64, 512), (10, 10), (8192,)]


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def fused(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


@pytest.mark.parametrize("make", [torch.optim.AdamW, sgd, fused])
def test_states_of_torch_s(make: Callable[..., Optimizer]) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert optimizer_memory(make, parameters, "cpu").states == sum(value.nbytes for value in states)


def test_eight_bits() -> None:
    """Two bytes a weight, and an absolute maximum for each 256; few weights stay in float32."""
    parameters = [torch.empty(shape, device="meta") for shape in SHAPES]
    large = 64 * 512 + 8192
    planned = optimizer_memory(AdamW8bit, parameters, "cuda").states
    assert planned == 2 * large + 2 * 4 * large // 256 + 2 * 4 * 100
    assert optimizer_memory(PagedAdamW8bit, parameters, "cuda").states == planned


def test_the_update_of_all_at_once_needs_a_copy_of_all() -> None:
    parameters = [torch.empty(shape, device="meta") for shape in SHAPES]
    assert optimizer_memory(torch.optim.AdamW, parameters, "cuda").workspace == 4 * (64 * 512 + 100 + 8192)
    assert optimizer_memory(torch.optim.AdamW, parameters, "cpu").workspace == 2 * 4 * 64 * 512
    assert optimizer_memory(fused, parameters, "cuda").workspace == 0


def test_what_cannot_step_without_memory() -> None:
    with pytest.raises(ValueError, match="what Adafactor needs cannot be planned"):
        optimizer_memory(torch.optim.Adafactor, [torch.empty(8, 8, device="meta")], "cpu")


def test_views_are_free_and_what_is_gone_is_not_counted() -> None:
    before = torch.ones(10)
    with MemoryTracker() as live:
        made = torch.empty(8, 8)
        view = made[2:].t()
        del made
        assert live.now == 256  # the view still holds all of it
        before.mul_(2)
        assert live.now == 256
        total = (view + 1).sum()
    assert live.peak == 256 + 192 + 4
    del view, total
    assert live.now == 0


def test_backward_counts_too() -> None:
    weight = torch.ones(100, requires_grad=True)
    with MemoryTracker() as live:
        loss = (weight.exp() * 2).sum()
        assert live.now == 404  # what exp keeps, and the loss
        loss.backward()
        del loss
    assert live.now == 400
    assert weight.grad is not None
