"""The kernels of the path `fused` against torch in float64, with masks that are drawn by another Philox."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.model.nf4.storage import NF4Weight
from tests.model.philox import dropout_mask, philox

# In bfloat16 the interpreter cuts off instead of rounding; half a unit in the last place.
PRECISIONS = [(torch.float32, 1e-6), (torch.float16, 6e-4)] + [(torch.bfloat16, 5e-3)] * torch.cuda.is_available()
PROBABILITIES = [0.0, 0.3]
# Below a program's tile, more than one, and not a multiple of it; the columns of Mixtral's hidden size are a multiple.
SIZES = [(1, 48), (7, 600), (9, 1024)]


def close(value: Tensor, truth: Tensor, tolerance: float) -> bool:
    return bool((value.double() - truth.double()).norm() <= tolerance * truth.double().norm().clamp_min(1e-12))


def test_random_numbers_are_those_of_the_paper() -> None:
    """Known answers of Random123's kat_vectors: counters and keys of zeros, and of ones."""
    for fill, expected in (
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        found = philox([np.array([fill], dtype=np.uint64)] * 4, [fill, fill])
        assert [int(word[0]) for word in found] == expected


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_gathering(
    rows: int, width: int, dtype: torch.dtype, tolerance: float, probability: float, device: str
) -> None:
    from lightning_mixcn.model.kernels.dropout import drop_arguments
    from lightning_mixcn.model.kernels.rows import gather_rows

    torch.manual_seed(rows)
    x, token = torch.randn(11, width).to(device, dtype), torch.randint(11, (rows,)).to(device)
    drop = drop_arguments(probability, 77)
    wide, alone, both = (x.new_full((rows, width + 3), 9.0) for _ in range(3))
    gather_rows(x, token, wide[:, :width], None, drop)
    gather_rows(x, token, None, alone[:, 1 : width + 1], drop)
    gather_rows(x, token, both[:, 2:-1], both[:, 2:-1], drop)  # dropped last
    assert torch.equal(wide[:, :width], x[token])
    mask = dropout_mask(token, width, probability, 77, 0)
    assert close(alone[:, 1 : width + 1].cpu(), x[token].cpu().double() * mask, tolerance)
    assert torch.equal(both[:, 2:-1], alone[:, 1 : width + 1])
    assert bool((wide[:, width:] == 9).all())
    assert bool((alone[:, [0, -1, -2]] == 9).all())


@pytest.mark.parametrize("weighted", [torch.float32, None])
@pytest.mark.parametrize("probability", [*PROBABILITIES, None])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_summing(
    tokens: int,
    width: int,
    dtype: torch.dtype,
    tolerance: float,
    probability: float | None,
    weighted: torch.dtype | None,
    device: str,
) -> None:
    from lightning_mixcn.model.kernels.dropout import drop_arguments
    from lightning_mixcn.model.kernels.rows import sum_rows

    torch.manual_seed(tokens)
    rows, more = (torch.randn(3 * tokens, width + 8).to(device, dtype)[:, :width] for _ in range(2))
    row = torch.randperm(3 * tokens).view(tokens, 3).to(device)
    weight = None if weighted is None else torch.rand(tokens, 3).to(device, weighted)
    truth = rows.double()[row]
    truth = truth.sum(1) if weight is None else (truth * weight.double()[:, :, None]).sum(1)
    if probability is None:
        found = sum_rows(rows, row, weight)
    else:
        found = sum_rows(rows, row, weight, more, drop_arguments(probability, 5))
        mask = dropout_mask(torch.arange(tokens), width, probability, 5, 0).to(device)
        truth = truth + mask * more.double()[row].sum(1)
    assert found.dtype == dtype
    assert close(found, truth, tolerance)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_swiglu_with_dropout_equals_autograd(
    rows: int, width: int, dtype: torch.dtype, tolerance: float, probability: float, adapted: bool, device: str
) -> None:
    from lightning_mixcn.model.kernels.dropout import COLUMNS, drop_arguments
    from lightning_mixcn.model.kernels.expert_swiglu import expert_swiglu, expert_swiglu_backward

    torch.manual_seed(width)
    token, drop, expert = torch.randperm(50)[:rows].to(device), drop_arguments(probability, 2**31 - 1), 3
    gate_up, dh, through_lora = (
        (torch.randn(rows, size) * 3).to(device, dtype) for size in (2 * width, width + 8, width)
    )
    weight, dh = torch.rand(rows, device=device), dh[:, :width]
    dweight = torch.empty(rows, -(-width // COLUMNS), device=device)
    h, dropped = gate_up.new_empty(rows, width + 8)[:, :width], gate_up.new_empty(rows, width)
    expert_swiglu(gate_up, token, expert, drop, h, dropped if probability else None)
    dgate_up, again = expert_swiglu_backward(
        gate_up, dh, through_lora if adapted else None, weight, token, expert, drop, dweight, adapted
    )
    exact, exact_weight = gate_up.double().requires_grad_(), weight.double().requires_grad_()
    mask = dropout_mask(token, width, probability, 2**31 - 1, 1 + expert).to(device)
    hidden = F.silu(exact[:, :width]) * exact[:, width:]
    scaled = hidden * exact_weight[:, None]
    torch.autograd.backward([scaled, scaled * mask], [dh.double(), through_lora.double() * adapted])
    assert close(h, hidden, tolerance)
    if probability:
        assert close(dropped, hidden * mask, 2 * tolerance)  # rounded twice
    assert exact.grad is not None
    assert exact_weight.grad is not None
    assert close(dgate_up, exact.grad, tolerance)
    assert close(dweight.sum(1), exact_weight.grad, 2e-6)
    assert (again is not None) == adapted
    if again is not None:
        assert close(again, scaled * mask, tolerance)


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_the_rate_of_dropout(probability: float, device: str) -> None:
    from lightning_mixcn.model.kernels.dropout import drop_arguments
    from lightning_mixcn.model.kernels.rows import gather_rows

    x, token = torch.ones(32, 1024, device=device), torch.arange(32, device=device)
    dropped = []
    for seed in (1, 2):
        out = torch.empty_like(x)
        gather_rows(x, token, None, out, drop_arguments(probability, seed))
        dropped.append((out == 0).double())
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert all(abs(float(part.mean()) - probability) < 4 * deviation for part in dropped)
    # Neighbours in either direction, the columns of one call, and another seed are independent.
    one, other = dropped
    pairs = [(one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one[:, 128:], one[:, :-128]), (one, other)]
    for left, right in pairs:
        assert abs(float((left * right).mean()) - probability**2) < 5 * probability / left.numel() ** 0.5


# Mixtral's matrices are whole superblocks; these begin inside one, have rows inside a block, or are not a whole tile.
@pytest.mark.parametrize("rank", [0, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available())
@pytest.mark.parametrize("shape", [(3, 40, 192), (2, 33, 50), (2, 128, 128), (3, 70, 64)])
def test_a_matrix_with_b_behind_it(shape: tuple[int, int, int], dtype: torch.dtype, rank: int, device: str) -> None:
    from lightning_mixcn.model.kernels.operand import decode_operand

    torch.manual_seed(rank)
    experts, rows, width = shape
    weight = NF4Weight(shape, device)
    weight.write(0, torch.randn(shape).flatten() * 0.1)
    behind = 24 if rank else 0
    b = torch.randn(rank, rows, device=device).t() if rank else None
    decode = weight.decoder(dtype)
    for index in range(experts):
        whole = torch.full((rows, width + behind + 8), 9.0, device=device, dtype=dtype)
        decode_operand(weight.packed(), shape, index, whole[:, : width + behind], b, 0.5, width + 3)
        assert torch.equal(whole[:, :width], decode(index))
        expected = torch.zeros(rows, behind, device=device)
        if b is not None:
            expected[:, 3 : 3 + rank] = b * 0.5
        assert torch.equal(whole[:, width : width + behind], expected.to(dtype))
        assert bool((whole[:, width + behind :] == 9).all())


def test_nothing_is_launched_on_meta() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    from lightning_mixcn.model.kernels.dropout import drop_arguments
    from lightning_mixcn.model.kernels.expert_swiglu import expert_swiglu, expert_swiglu_backward
    from lightning_mixcn.model.kernels.operand import decode_operand
    from lightning_mixcn.model.kernels.rows import gather_rows, sum_rows

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    drop, token, row = drop_arguments(0.1, 3), empty(6, dtype=torch.int64), empty(3, 2, dtype=torch.int64)
    gather_rows(empty(3, 64), token, empty(6, 64), empty(6, 64), drop)
    assert sum_rows(empty(6, 64), row, empty(3, 2), empty(6, 64), drop).shape == (3, 64)
    expert_swiglu(empty(6, 64), token, 0, drop, empty(6, 32), empty(6, 32))
    weight = NF4Weight((2, 32, 64), "meta")
    decode_operand(weight.packed(), weight.shape, 1, empty(32, 72), empty(32, 8), 1.0, 64)
    dgate_up, again = expert_swiglu_backward(
        empty(6, 64), empty(6, 32), empty(6, 32), empty(6), token, 0, drop, empty(6, 1), True
    )
    assert dgate_up.shape == (6, 64)
    assert again is not None
    assert again.shape == (6, 32)
