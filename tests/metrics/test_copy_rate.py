"""A rate is measured once."""

import torch

from lightning_mixcn.metrics.device import copy_rate


def test_a_rate() -> None:
    rate = copy_rate(torch.device("cpu"))
    assert 1e7 < rate < 1e13
    assert copy_rate(torch.device("cpu")) == rate
