"""Attention within documents against transformers' masks."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.attention.documents import NAME, document_spans

POSITIONS = torch.tensor([[*range(17), *range(1), *range(22)], [*range(17), *range(23)]])


def test_spans() -> None:
    assert document_spans(POSITIONS) == {(0, 17): [0, 1], (17, 18): [0], (18, 40): [0], (17, 40): [1]}
    assert document_spans(torch.arange(5).expand(2, 5)) == {(0, 5): [0, 1]}


def test_a_row_that_goes_on_with_a_document_is_one_span() -> None:
    assert document_spans(torch.arange(7, 12)[None]) == {(0, 5): [0]}


@pytest.mark.parametrize("positions", [POSITIONS, torch.arange(40).expand(2, 40), None])
def test_loss_and_gradients_equal_those_with_transformers_masks(
    base: Path, ids: Tensor, positions: Tensor | None
) -> None:
    results = {}
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    for implementation in (NAME, "sdpa", "eager"):
        model = load_mixtral(base, quantization="none", dtype="float32", lora=lora)
        assert model.config._attn_implementation == NAME
        model.set_attn_implementation(implementation)
        out = model(input_ids=ids, labels=ids, position_ids=positions)
        out.loss.backward()
        results[implementation] = [out.nll, *(p.grad for p in model.parameters() if p.grad is not None)]
    for other in ("sdpa", "eager"):
        for one, two in zip(results[NAME], results[other], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_no_token_sees_another_document(base: Path, ids: Tensor) -> None:
    model = load_mixtral(base, quantization="none", dtype="float32")
    packed = model(input_ids=ids, labels=ids, position_ids=POSITIONS).nll
    alone = model(input_ids=ids[1:, 17:], labels=ids[1:, 17:]).nll
    torch.testing.assert_close(packed[1:, 18:], alone[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_sliding_window_is_respected(tiny: Path, ids: Tensor) -> None:
    losses = []
    for implementation in (NAME, "eager"):
        model = load_mixtral(tiny, quantization="none", dtype="float32")
        model.config.sliding_window = 8
        model.set_attn_implementation(implementation)
        losses.append(model(input_ids=ids, labels=ids, position_ids=POSITIONS).nll)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_documents_in_bfloat16_are_as_near_to_float32_as_transformers(base: Path, ids: Tensor) -> None:
    """The CPU's own path for bfloat16, with documents of several lengths in a row."""
    nll = {}
    for dtype, implementation in (("float32", "sdpa"), ("bfloat16", "sdpa"), ("bfloat16", NAME)):
        model = load_mixtral(base, quantization="none", dtype=dtype)
        model.set_attn_implementation(implementation)
        nll[dtype, implementation] = model(input_ids=ids, labels=ids, position_ids=POSITIONS).nll.detach()
    exact = nll["float32", "sdpa"]
    # The median of the tokens: rounding sends one whose router is undecided to another expert, which hides the rest.
    error = {name: (values - exact).abs().median() for (_, name), values in nll.items() if values is not exact}
    assert error[NAME] <= 1.2 * error["sdpa"]
