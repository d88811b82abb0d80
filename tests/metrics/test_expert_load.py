"""Expert load against counts in plain Python, and numbers that can be worked out by hand."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_mixcn.metrics.expert_load import (
    ExpertLoad,
    jensen_shannon_bits,
    load_numbers,
    shares,
)

GROUPS, LAYERS, EXPERTS, TOP_K = 3, 2, 5, 2
Batch = tuple[int, Tensor, Tensor, Tensor]


def batches(dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for layer in (0, 1, 0, 1):
        logits = (4 * torch.randn(31, EXPERTS, generator=generator)).to(dtype)
        groups = torch.randint(-1, GROUPS, (31,), generator=generator)
        made.append((layer, logits, logits.topk(TOP_K).indices, groups))
    return made


def loaded(given: list[Batch]) -> ExpertLoad:
    load = ExpertLoad(GROUPS, LAYERS, EXPERTS)
    for batch in given:
        load.update(*batch)
    return load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_sums_in_plain_python(dtype: torch.dtype) -> None:
    given = batches(dtype)
    chosen: Counter[tuple[int, int, int]] = Counter()
    tokens: Counter[tuple[int, int]] = Counter()
    entropy: Counter[tuple[int, int]] = Counter()
    confidence: Counter[tuple[int, int]] = Counter()
    for layer, logits, experts, groups in given:
        for row, picks, group in zip(logits.tolist(), experts.tolist(), groups.tolist(), strict=True):
            if group < 0:
                continue
            total = sum(math.exp(logit) for logit in row)
            p = [math.exp(logit) / total for logit in row]
            tokens[group, layer] += 1
            entropy[group, layer] -= sum(q * math.log(q) for q in p)  # type: ignore[assignment]  # Counter of floats
            confidence[group, layer] += max(p)  # type: ignore[assignment]  # Counter of floats
            chosen.update((group, layer, expert) for expert in picks)
    sums = loaded(given).compute()
    assert sums.counts.dtype == sums.tokens.dtype == torch.int64
    assert sums.entropy_nats.dtype == sums.confidence.dtype == torch.float64
    for group in range(GROUPS):
        for layer in range(LAYERS):
            key = group, layer
            assert sums.counts[key].tolist() == [chosen[group, layer, expert] for expert in range(EXPERTS)]
            assert int(sums.tokens[key]) == tokens[key]
            assert float(sums.entropy_nats[key]) == pytest.approx(entropy[key], rel=1e-6)
            assert float(sums.confidence[key]) == pytest.approx(confidence[key], rel=1e-6)


def test_what_a_router_makes_of_padding_does_not_matter() -> None:
    layer, logits, experts, groups = batches()[0]
    expected = loaded([(layer, logits, experts, groups)]).compute()
    logits[groups < 0] = math.nan
    assert (groups < 0).any()
    for ours, clean in zip(loaded([(layer, logits, experts, groups)]).compute(), expected, strict=True):
        assert torch.equal(ours, clean)


def test_counts_stay_exact_where_floats_end() -> None:
    load = ExpertLoad(1, 1, 2)
    load.counts += 2**40
    load.update(0, torch.zeros(1, 2), torch.tensor([[1]]), torch.tensor([0]))
    assert load.compute().counts.tolist() == [[[2**40, 2**40 + 1]]]


def test_of_groups() -> None:
    sums = loaded(batches()).compute()
    some, rest = sums.of_groups([0, 2]), sums.of_groups([1])
    for whole, one, other in zip(sums, some, rest, strict=True):
        torch.testing.assert_close(whole.sum(0), one + other)


def test_empty_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_layers=0`"):
        ExpertLoad(1, 0, 4)


EVEN, ONE, SKEWED = [25, 25, 25, 25], [100, 0, 0, 0], [50, 50, 0, 0]


@pytest.mark.parametrize(
    ("counts", "imbalance", "variation", "dead", "effective"),
    [
        (EVEN, 1.0, 0.0, 0.0, 4.0),
        (ONE, 4.0, math.sqrt(3), 0.75, 1.0),
        (SKEWED, 2.0, 1.0, 0.5, 2.0),
        # shares 0.4, 0.3, 0.2, 0.1: deviations 0.15, 0.05, 0.05, 0.15 around a mean of 0.25
        ([4, 3, 2, 1], 1.6, math.sqrt(0.05 / 4) / 0.25, 0.0, 0.4**-0.4 * 0.3**-0.3 * 0.2**-0.2 * 0.1**-0.1),
    ],
)
def test_numbers_worked_out_by_hand(
    counts: list[int], imbalance: float, variation: float, dead: float, effective: float
) -> None:
    numbers = load_numbers(torch.tensor([counts, EVEN]))
    for name, value, even in (
        ("imbalance_max_over_mean", imbalance, 1.0),
        ("coefficient_of_variation", variation, 0.0),
        ("dead_expert_fraction", dead, 0.0),
        ("effective_experts", effective, 4.0),
        ("smallest_share", min(counts) / sum(counts), 0.25),
    ):
        assert numbers[name].tolist() == pytest.approx([value, even], abs=1e-12), name


def test_nothing_counted_is_no_number() -> None:
    assert all(number.isnan() for number in load_numbers(torch.zeros(4, dtype=torch.int64)).values())


def test_divergence() -> None:
    p, q = torch.tensor([4, 3, 2, 1]), torch.tensor([1, 1, 1, 7])
    tables = shares(torch.stack((p, q)))
    middle = tables.mean(0)
    by_hand = sum(float((table * (table / middle).log2()).sum()) for table in tables) / 2
    assert float(jensen_shannon_bits(tables)) == pytest.approx(by_hand)
    assert float(jensen_shannon_bits(tables.flip(0))) == pytest.approx(by_hand)
    assert float(jensen_shannon_bits(shares(torch.stack((p, p))))) == 0.0
    # By layer, and three that share nothing.
    layers = torch.stack((torch.eye(3), torch.full((3, 3), 1 / 3)), 1).double()
    assert jensen_shannon_bits(layers).tolist() == pytest.approx([math.log2(3), 0.0], abs=1e-12)


# Ranks count (30, 10, 10, 10) and (10, 30, 10, 10): 2.0 each, 1.33 together.
PROGRAM = """
import sys
import torch
from lightning_mixcn.metrics.expert_load import ExpertLoad, load_numbers
out, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
load = ExpertLoad(1, 1, 4)
experts = torch.tensor([0] * 30 + [1] * 10 + [2] * 10 + [3] * 10)
load.update(0, torch.zeros(60, 4), (experts ^ rank)[:, None], torch.zeros(60, dtype=torch.int64))
sums = load.compute()
assert sums.tokens.item() == 120
print(sums.counts.flatten().tolist())
print(float(load_numbers(sums.counts)["imbalance_max_over_mean"]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_imbalance_of_two_ranks_is_of_their_sum(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        output, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        counts, imbalance = output.splitlines()
        assert counts == "[40, 40, 20, 20]"
        assert float(imbalance) == pytest.approx(4 / 3)
