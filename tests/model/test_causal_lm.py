"""The model against stock transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.causal_lm import CACHE_ARGUMENT


@pytest.fixture
def stock(base: Path) -> Any:
    """Load the same folder by transformers."""
    return transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """MKL splits the fused and the single products of the experts differently over several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
def test_logits_are_transformers_bit_for_bit(base: Path, stock: Any, ids: Tensor) -> None:
    model = load_mixtral(base, quantization="none", dtype="float32")
    assert isinstance(model, transformers.MixtralForCausalLM)
    assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_loss_auxiliary_loss_and_nll_equal_transformers(base: Path, stock: Any, ids: Tensor) -> None:
    model = load_mixtral(base, quantization="none", dtype="float32")
    labels = ids.clone()
    labels[0, 5:9] = -100
    ours = model(input_ids=ids, labels=labels, output_router_logits=True)
    theirs = stock(input_ids=ids, labels=labels, output_router_logits=True)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-6, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(theirs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(ours.nll[:, 1:], expected, rtol=1e-5, atol=1e-5)
    assert ours.logits is None


def test_padding_takes_no_part_in_the_auxiliary_loss(base: Path, stock: Any, ids: Tensor) -> None:
    model = load_mixtral(base, quantization="none", dtype="float32")
    documents = torch.zeros_like(ids)
    documents[1, 20:] = -1
    ours = model(input_ids=ids, labels=ids, document_ids=documents, output_router_logits=True)
    logits = stock.model(input_ids=ids, output_router_logits=True).router_logits
    kept = tuple(layer[(documents >= 0).flatten()] for layer in logits)
    config = stock.config
    expected = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(
        kept, config.num_local_experts, config.num_experts_per_tok
    )
    torch.testing.assert_close(ours.aux_loss, expected)


def test_a_batch_of_padding_alone_has_no_auxiliary_loss(tiny: Path, ids: Tensor) -> None:
    model = load_mixtral(tiny, quantization="none", dtype="float32", lora=peft.LoraConfig(target_modules=["gate"]))
    nothing = torch.full_like(ids, -1)
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), document_ids=nothing, output_router_logits=True)
    out.loss.backward()
    assert out.loss == out.aux_loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_in_a_row_do_not_see_each_other(base: Path, attention: str, ids: Tensor) -> None:
    model = load_mixtral(base, quantization="none", dtype="float32")
    model.set_attn_implementation(attention)
    first, second = ids[:1, :17], ids[1:, :23]
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions).logits
    torch.testing.assert_close(packed[:, 17:], model(input_ids=second).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, :17], model(input_ids=first).logits, rtol=1e-5, atol=1e-5)


def test_greedy_generation_equals_transformers(base: Path, stock: Any, ids: Tensor) -> None:
    model: Any = load_mixtral(base, quantization="none", dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    ours, theirs = (generating.generate(ids[:1, :9], **options) for generating in (model, stock))
    assert ours.tolist() == theirs.tolist()


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [True, False])
def test_a_cache_takes_the_tokens_of_both_calls(base: Path, stock: Any, ids: Tensor, with_positions: bool) -> None:
    """By transformers' name of the argument, which is another one since 5.24."""
    caches, logits = [], []
    for model in (load_mixtral(base, quantization="none", dtype="float32"), stock):
        cache = transformers.DynamicCache(config=stock.config)
        for start, stop in ((0, 9), (9, 12)):
            positions = {"position_ids": torch.arange(start, stop)[None]} if with_positions else {}
            output = model(input_ids=ids[:1, start:stop], **{CACHE_ARGUMENT: cache}, **positions)
        caches.append(cache.get_seq_length())
        logits.append(output.logits)
    assert caches == [12, 12]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_saving_the_frozen_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mixcn quantize"):
        load_mixtral(tiny).save_pretrained(tmp_path / "out")
