"""The choice of a path, and whole models that give the same numbers on each."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_mixcn.model import load_mixtral, set_activation_checkpointing, shard_model
from lightning_mixcn.model.experts import block as expert_path
from lightning_mixcn.model.experts.block import choose_expert_path
from lightning_mixcn.model.experts.operands import (
    BlockInputs,
    Dropout,
    ExpertFactors,
    ExpertWeights,
)
from lightning_mixcn.model.nf4.storage import DenseWeight
from lightning_mixcn.testing import run_distributed

INDEX = torch.zeros(6, 2, dtype=torch.int64)


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is unset, whatever whoever runs the tests has set."""
    monkeypatch.delenv("MIXCN_EXPERT_PATH", raising=False)


def inputs(hidden: int = 32, rank: int = 8) -> BlockInputs:
    """Six tokens and three experts: four rows an expert."""
    dtype = torch.bfloat16
    gate, up = (DenseWeight((3, 48, hidden), dtype) for _ in range(2))
    weights = ExpertWeights(gate, up, DenseWeight((3, hidden, 48), dtype))
    b = torch.zeros(3, 48, rank, dtype=dtype)
    factors = ExpertFactors(torch.zeros(3, 2 * rank, hidden, dtype=dtype), b, b, None, None)
    return BlockInputs(torch.zeros(6, hidden, dtype=dtype), torch.zeros(6, 2), weights, Dropout(), factors)


def test_on_the_cpu_it_is_the_loop() -> None:
    assert choose_expert_path(inputs(), INDEX) == "loop"


@pytest.mark.parametrize("path", ["loop", "grouped", "decode"])
def test_the_environment_decides(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(expert_path, "_has_triton", lambda: True)
    assert choose_expert_path(inputs(), INDEX) == path


@pytest.mark.parametrize(
    ("interpreter", "triton", "message"), [("0", True, "runs on a GPU, not on cpu"), ("1", False, "not installed")]
)
def test_a_kernel_that_cannot_run(
    interpreter: str, triton: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "decode")
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    monkeypatch.setattr(expert_path, "_has_triton", lambda: triton)
    with pytest.raises(ValueError, match=message):
        choose_expert_path(inputs(), INDEX)


def test_an_unknown_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fast")
    with pytest.raises(ValueError, match=r"`MIXCN_EXPERT_PATH='fast'` .* loop, grouped, decode"):
        choose_expert_path(inputs(), INDEX)


@pytest.mark.parametrize("sizes", [{"hidden": 36}, {"rank": 3}], ids=str)
def test_sizes_that_grouped_products_cannot_take(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    with pytest.raises(ValueError, match="no multiple of 16 bytes"):
        choose_expert_path(inputs(**sizes), INDEX)


@pytest.mark.parametrize(("below", "chosen"), [(4.0, "grouped"), (5.0, "decode")])
def test_the_table_is_read_by_rows_of_an_expert(below: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(expert_path, "_has_triton", lambda: True)
    monkeypatch.setitem(expert_path.FASTEST, "cpu", ((below, "decode"), (math.inf, "grouped")))
    assert choose_expert_path(inputs(), INDEX) == chosen
    assert choose_expert_path(inputs(rank=3), INDEX) == "loop"


def gradients(base: Path, ids: Tensor, quantization: str, mode: str) -> dict[str, Tensor]:
    """Loss and gradients with everything that PEFT's configuration can vary here."""
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.2, use_rslora=True,
        rank_pattern={"up_proj": 8, "down_proj": 16}, alpha_pattern={"gate_proj": 3},
    )  # fmt: skip
    model = load_mixtral(base, quantization=quantization, dtype="float32", lora=lora).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    set_activation_checkpointing(model, mode)
    torch.manual_seed(5)
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": out.loss.detach()} | found


@pytest.mark.parametrize(("quantization", "mode"), [("none", "full"), ("nf4", "none"), ("nf4", "full")])
def test_a_model_trains_the_same(
    tiny: Path, ids: Tensor, quantization: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = gradients(tiny, ids, quantization, mode)
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    grouped = gradients(tiny, ids, quantization, mode)
    assert loop.keys() == grouped.keys()
    for name, value in loop.items():
        # float32 sums in another order, through two layers; the dropout masks are the same.
        assert (grouped[name] - value).norm() <= 1e-5 * value.norm(), name


@torch.no_grad()
def test_logits_and_generation_are_those_of_transformers(
    base: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    model: Any = load_mixtral(base, quantization="none", dtype="float32")
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:1], **kwargs), stock.generate(ids[:1], **kwargs))


def trained_gradients(base: str, ids: Tensor, path: str, sharded: bool) -> dict[str, Tensor]:
    """Gradients of all adapters, gathered where they are sharded."""
    os.environ["MIXCN_EXPERT_PATH"] = path
    shard = None
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        shard = partial(shard_model, mesh=mesh)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = load_mixtral(base, dtype="float32", lora=lora, shard=shard).train()
    set_activation_checkpointing(model, "full")
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if sharded else grad for name, grad in found.items()}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sharded_weights(tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = run_distributed(trained_gradients, 2, str(tiny), ids, "grouped", True)
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "loop")
    alone = trained_gradients(str(tiny), ids, "loop", False)
    # Both ranks see the same rows, so the mean of their gradients is the gradient of one process.
    for found in ranks:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
