"""Sums of phases on a clock that is given."""

import pytest
import torch

from lightning_mixcn.callbacks.clocks import PhaseClock


def test_phases_are_added_up() -> None:
    ticks = iter([1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    clock = PhaseClock(torch.device("cpu"), now=lambda: next(ticks))
    assert clock.take() == {}
    for phase in ("forward", "backward", "forward", "other"):
        clock.mark(phase)
    assert clock.take() == {"forward": 2.0 + 4.0, "backward": 3.0}
    clock.mark("forward")
    assert clock.take() == {"other": 5.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_device_s_own_time_counts() -> None:
    device = torch.device("cuda")
    clock, a = PhaseClock(device), torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    clock.mark("forward")
    for _ in range(20):
        a = a @ a
    clock.mark("other")
    assert clock.take()["forward"] > 0.001
