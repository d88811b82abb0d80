"""NF4 against bitsandbytes' own nested quantisation, superblock by superblock."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mixcn.model.nf4 import codec as nf4

Roundtrip = Callable[[Tensor, torch.dtype], Tensor]


@pytest.mark.parametrize("numel", [5, 64 * 172, 16384, 3 * 16384, 2 * 16384 + 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bitsandbytes(numel: int, dtype: torch.dtype, bitsandbytes_roundtrip: Roundtrip) -> None:
    values = (torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 0.02).to(dtype)
    packed = nf4.quantize_nf4(values)
    assert packed.codes.shape == (nf4.superblocks(numel), 8192)
    assert [tensor.dtype for tensor in packed] == [torch.uint8, torch.uint8, torch.float32, torch.float32]
    ours = nf4.dequantize_nf4(packed, torch.float32)[:numel]
    theirs = bitsandbytes_roundtrip(values, dtype).float()
    # The offset is a mean of 256 numbers, summed in another order; in bf16 their result is rounded as well.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-8)


def test_a_slice_of_superblocks_is_the_slice_of_the_whole() -> None:
    values = torch.randn(5 * nf4.SUPERBLOCK + 77)
    whole, part = nf4.quantize_nf4(values), nf4.quantize_nf4(values[2 * nf4.SUPERBLOCK :])
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[2:], other)


def test_the_second_level_is_added_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(16 * nf4.SUPERBLOCK - 64 * 5, generator=torch.Generator().manual_seed(0))
    whole = nf4.quantize_nf4(values)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    permuted = nf4.quantize_nf4(torch.cat([values[: 15 * nf4.SUPERBLOCK].view(15, -1)[order].flatten(), values[-100:]]))
    rows = [nf4.quantize_nf4(values[n * nf4.SUPERBLOCK : (n + 1) * nf4.SUPERBLOCK]) for n in range(16)]
    for name in nf4.NF4Tensors._fields:
        kept = getattr(whole, name)
        assert torch.equal(getattr(permuted, name)[:15], kept[:15][order]), name
        assert torch.equal(torch.cat([getattr(row, name) for row in rows]), kept), name
    # Eight halvings, by hand in float32; the last superblock has five blocks less.
    sums = nf4.quantize_codes(torch.nn.functional.pad(values, (0, 64 * 5)))[1].view(16, 256).numpy()
    for half in (128, 64, 32, 16, 8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    counts = [256] * 15 + [251]
    assert whole.super_offset.tolist() == [
        float(total / np.float32(n)) for total, n in zip(sums[:, 0], counts, strict=True)
    ]
    monkeypatch.setattr(torch.Tensor, "mean", None)  # of another order on each device
    nf4.quantize_nf4(values)


def test_float64_is_rounded_to_float32() -> None:
    values = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(nf4.quantize_nf4(values), nf4.quantize_nf4(values.float()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_quantises_bit_for_bit_as_the_cpu(dtype: torch.dtype) -> None:
    values = (torch.randn(37 * nf4.SUPERBLOCK - 100, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for one, other in zip(nf4.quantize_nf4(values), nf4.quantize_nf4(values.cuda()), strict=True):
        assert torch.equal(one, other.cpu())


class Stream:
    """Keeps who waited for whom."""

    def __init__(self, name: str, waits: list[str]) -> None:
        self.name, self.waits = name, waits

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(f"{self.name} for {other.name}")


def test_kernels_of_the_default_stream_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    current, default = Stream("current", waits), Stream("default", waits)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: default)
    with nf4.default_stream(torch.device("cuda")):
        assert waits == ["default for current"]
    assert waits == ["default for current", "current for default"]
    with nf4.default_stream(torch.device("cpu")):
        assert len(waits) == 2


@pytest.mark.gpu
def test_quantising_on_another_stream() -> None:
    values = torch.randn(37 * nf4.SUPERBLOCK, generator=torch.Generator().manual_seed(0)).cuda()
    expected = nf4.quantize_nf4(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = values * 0
        for _ in range(200):  # long enough for a kernel that does not wait to read zeros
            late.add_(values).sub_(values)
        found = nf4.quantize_nf4(late.copy_(values))
    torch.cuda.synchronize()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_relative_error_is_that_of_double_quantised_nf4() -> None:
    values = torch.randn(64 * nf4.SUPERBLOCK, generator=torch.Generator().manual_seed(0))
    error = (nf4.dequantize_nf4(nf4.quantize_nf4(values), torch.float32) - values).norm() / values.norm()
    assert abs(error - 0.0920) < 2e-4  # 0.0920020 with bitsandbytes' own double quantisation


def test_zeros_stay_zeros() -> None:
    assert not nf4.dequantize_nf4(nf4.quantize_nf4(torch.zeros(nf4.SUPERBLOCK + 3)), torch.float32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.02, 1e-6, 3e4])
def test_codes_and_maxima_are_bitsandbytes_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float
) -> None:
    monkeypatch.setattr(nf4, "_CPU_CHUNK", 64 * 40)  # three chunks, the last one shorter
    values = torch.randn(64 * 100, generator=torch.Generator().manual_seed(0)).clamp_(-2, 2).mul_(scale).to(dtype)
    values[64:128] = 0
    values[128:144] = torch.tensor([*nf4._code_bounds(), 1.0]).to(dtype)  # equal to a bound, which goes down
    values[144:192] = 0
    codes, absmax = nf4.quantize_codes(values)
    expected_codes, expected_absmax = torch.ops.bitsandbytes.quantize_4bit(values, 64, "nf4", torch.uint8)
    assert torch.equal(codes, expected_codes.flatten())
    assert torch.equal(absmax, expected_absmax.float())
