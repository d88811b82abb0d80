"""Names that drivers report, and what is measured where they say nothing."""

import pytest
import torch

from lightning_mixcn.metrics.device import copy_rate, peak_rate, stated_peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71.0),
    ],
)
def test_known_devices(name: str, teraflops: float) -> None:
    assert stated_peak(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "Tesla T4",
    ],
)
def test_unknown_devices(name: str) -> None:
    assert stated_peak(name) is None


def test_what_is_measured_is_kept() -> None:
    first = peak_rate(torch.device("cpu"), torch.float32)
    assert first.measured
    assert first.flops_per_second > 1e8
    assert peak_rate(torch.device("cpu"), torch.float32) == first


def test_a_rate() -> None:
    rate = copy_rate(torch.device("cpu"))
    assert 1e7 < rate < 1e13
    assert copy_rate(torch.device("cpu")) == rate
