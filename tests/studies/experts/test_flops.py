"""Floating point operations: against torch's own counter and the counts of training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig

from lightning_mixcn.model import build_mixtral, build_moe, load_mixtral
from lightning_mixcn.model.memory.flops import count_training_flops
from lightning_mixcn.studies.experts.flops import ForwardFlops, StudyFlops, pairs_of_rows
from lightning_mixcn.studies.experts.importance import ExpertImportance
from lightning_mixcn.testing import random_batch, tiny_config, tiny_mixtral_config
from tests.model.architectures.test_families import REAL

MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
)  # fmt: skip


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules=["q_proj", "gate", "w1", "w2"])])
def test_a_whole_pass_is_the_forward_of_training(lora: LoraConfig | None, tiny_base: Path) -> None:
    model = load_mixtral(tiny_base, lora=lora)
    expected = count_training_flops(model, "none").of(tokens=100, pairs=700).forward
    assert ForwardFlops.of(model).above(-1, 100, 700) == expected


@pytest.mark.parametrize(("has_mask", "expected"), [(True, 0.4995), (False, 0.4978)])
def test_the_study_of_mixtral_8x7b_is_half_of_plain_evaluations(has_mask: bool, expected: float) -> None:
    forward = ForwardFlops.of(build_mixtral(MIXTRAL_8X7B, device="meta"))
    study = StudyFlops(forward, num_experts=8, num_modes=1, has_mask=has_mask, sample_tokens=64)
    # By hand, in GFLOP a token: a layer is 0.806 and the head 0.262, so 15.5 layers and the head are 0.489 of all. Two
    # passes of the unchanged model are 2/256 more, and one more expert in each layer 0.0017.
    tokens, pairs = 2048, 2048 * 2049 // 2
    share = study.planned(tokens, pairs) / study.plain(tokens, pairs)
    assert share <= 0.55
    assert share == pytest.approx(expected, abs=0.0005)


@pytest.mark.parametrize(
    ("family", "gigaflops", "total", "passes"), [("olmoe", 2.5, 8.6e16, 527), ("qwen3_moe", 6.9, 1.5e18, 3293)]
)
def test_what_the_help_says_of_many_experts(family: str, gigaflops: float, total: float, passes: int) -> None:
    """Two sources of 32,768 tokens."""
    config = tiny_config(family, **REAL[family])
    forward = ForwardFlops.of(build_moe(config, device="meta"))
    size = 65_536, 32 * 2048 * 2049 // 2
    one = forward.above(-1, *size)
    assert one / 65_536 == pytest.approx(gigaflops * 1e9, rel=0.02)
    mask, saliency = (StudyFlops(forward, config.num_local_experts, modes, True, 64) for modes in (1, 0))
    assert mask.planned(*size) == pytest.approx(total, rel=0.02)
    assert round(mask.planned(*size) / one) == passes
    assert saliency.planned(*size) == one


def test_what_is_counted_is_what_torch_counts() -> None:
    """At 32 layers, run whole: planned, done and torch's count of products, beside that of plain evaluations."""
    config = tiny_mixtral_config(num_hidden_layers=32, num_local_experts=4, hidden_size=64, intermediate_size=128)
    model: Any = build_mixtral(config, quantization="none", dtype="float32").eval()
    importance = ExpertImportance(model, ["mask"], 1, micro_batch_size=2)
    batch = random_batch([48, 48], sequence_length=48)
    tokens, pairs = 96, sum(pairs_of_rows(batch["position_ids"]))
    with FlopCounterMode(display=False) as plain:
        evaluated = importance.evaluate(batch)
    with FlopCounterMode(display=False) as counter:
        parts = dict(importance.disable(batch, evaluated, range(32)))
    done = int(evaluated["flops"]) + sum(int(part["flops"]) for part in parts.values())
    assert done <= importance.flops.planned(tokens, pairs)
    assert done / importance.flops.plain(tokens, pairs) <= 0.55

    def products(counted: FlopCounterMode) -> int:
        return sum(
            flops for operator, flops in counted.get_flop_counts()["Global"].items() if "attention" not in str(operator)
        )

    assert (products(plain) + products(counter)) / (32 * 4 * products(plain)) <= 0.55
    # torch's counter does not know attention on the CPU.
    forward = dataclasses.replace(ForwardFlops.of(model), pair=0)
    assert products(plain) == pytest.approx(forward.above(-1, tokens, 0), rel=0.03)
    attention = done - sum(
        ForwardFlops.of(model).pair * pairs * passes for passes in [32, 32, *(4 * (31 - layer) for layer in range(32))]
    )
    assert products(plain) + products(counter) == pytest.approx(attention, rel=0.03)


def test_pairs_of_rows() -> None:
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    assert pairs_of_rows(positions) == [10, 6]
