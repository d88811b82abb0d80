"""Chunked prefill against one full forward pass of transformers, and the memory that it takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import MixtralForCausalLM

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.inference.prefill import ChunkedPrefill, ChunkScores


def random_row(length: int) -> Tensor:
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length))


def prefill(prefilled: ChunkedPrefill, row: Tensor, chunk: int) -> ChunkScores:
    prefilled.restart()
    with torch.no_grad():
        parts = [prefilled.advance(row[i : i + chunk], row[i + 1 : i + 1 + chunk]) for i in range(0, len(row), chunk)]
    return ChunkScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def stock(model: nn.Module, row: Tensor) -> ChunkScores:
    """One forward pass that holds all logits."""
    with torch.no_grad():
        logits = model(input_ids=row[None]).logits[0, :-1].float()
    return ChunkScores(F.cross_entropy(logits, row[1:], reduction="none").double(), logits.argmax(1) == row[1:])


@pytest.mark.parametrize("length", [2, 129, 700])
@pytest.mark.parametrize("chunk", [1, 64, 128, 1000])
def test_it_is_a_full_forward_of_transformers(length: int, chunk: int, tiny_base: Path) -> None:
    """700 tokens are beyond the 512 that the model's configuration names."""
    row = random_row(length)
    got = prefill(ChunkedPrefill(load_mixtral(tiny_base, quantization="none", dtype="float32"), length), row, chunk)
    expected = stock(MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), row)
    assert got.nats.dtype == torch.float64
    torch.testing.assert_close(got.nats, expected.nats, rtol=0, atol=1e-4)
    assert torch.equal(got.is_argmax, expected.is_argmax)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_with_lora(quantization: str, tiny_base: Path) -> None:
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "k_proj", "gate", "w1", "w2", "w3"])
    model = load_mixtral(tiny_base, quantization=quantization, dtype="float32", lora=lora).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:  # B is zero at first
            nn.init.normal_(parameter, std=0.1)
    row = random_row(200)
    expected = stock(model, row)
    base = stock(load_mixtral(tiny_base, quantization=quantization, dtype="float32"), row)
    assert (expected.nats - base.nats).abs().max() > 1e-2
    torch.testing.assert_close(prefill(ChunkedPrefill(model, 200), row, 32).nats, expected.nats, rtol=0, atol=1e-4)


def test_one_cache_serves_many_rows_and_leaves_the_model_as_it_was(tiny_base: Path) -> None:
    model = load_mixtral(tiny_base, quantization="none", dtype="float32")
    prefilled = ChunkedPrefill(model, 300)
    before = stock(model, random_row(50))
    first = prefill(prefilled, random_row(300), 100).nats
    prefill(prefilled, random_row(40), 16)
    assert prefilled.tokens == 40
    assert torch.equal(prefill(prefilled, random_row(300), 100).nats, first)
    torch.testing.assert_close(prefill(prefilled, random_row(300), 150).nats, first, rtol=0, atol=1e-4)
    assert torch.equal(stock(model, random_row(50)).nats, before.nats)


def test_logits_are_those_of_a_chunk_only(tiny_base: Path) -> None:
    model = load_mixtral(tiny_base, quantization="none", dtype="float32")
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    prefill(ChunkedPrefill(model, 90), random_row(90), 40)
    assert widths == [40, 40, 10]


def test_all_masks_are_windows_of_one(tiny_base: Path) -> None:
    """Made for each chunk, each would be larger than the memory that the one before has freed."""
    model = load_mixtral(tiny_base, quantization="none", dtype="float32")
    masks: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    prefill(ChunkedPrefill(model, 300), random_row(300), 40)
    assert [tuple(mask.shape[2:]) for mask in masks] == [(40, 40 * (i + 1)) for i in range(7)] + [(20, 300)]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1


def test_a_sliding_window_is_refused(tiny_base: Path) -> None:
    model = load_mixtral(tiny_base, quantization="none", dtype="float32")
    model.config.sliding_window = 64
    with pytest.raises(ValueError, match=r"sliding_window=64 is shorter than a row of 100 tokens\. Evaluate shorter"):
        ChunkedPrefill(model, 100)


LONG_ROW = """
import sys
import torch
from transformers import MixtralConfig
from lightning_mixcn.model import build_mixtral
from lightning_mixcn.commands.process import peak_resident_bytes
from lightning_mixcn.studies.long_context.likelihood import DocumentRow, evaluate_lengths

config = MixtralConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
)
length = int(sys.argv[1])
ids = torch.randint(3, 49152, (length,), generator=torch.Generator().manual_seed(0))
row = DocumentRow(0, ids, torch.ones_like(ids))
result = evaluate_lengths(build_mixtral(config), [row], ["random"], [512, length], 512)
print(result.likelihoods[-1]["tokens"], result.likelihoods[-1]["nll_nats_per_token"])
print(peak_resident_bytes())
"""


# A minute and a third of an hour on one core, nearly all of it attention.
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("length", "limit"), [pytest.param(2048, 1.5e9, id="2k"), pytest.param(32_768, 2.5e9, id="32k")]
)
def test_memory_of_a_long_row_at_the_demo_s_size(length: int, limit: float) -> None:
    command = [sys.executable, "-c", LONG_ROW, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, nats, peak = done.stdout.split()
    assert int(tokens) == length - 1
    # Random weights know nothing: about ln 49,152.
    assert float(nats) == pytest.approx(10.8, abs=0.5)
    assert int(peak) < limit
