"""Attention of all documents in one call: offsets by hand, numbers against masks, and what torch's own call accepts."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.attention import documents as attention
from lightning_mixcn.model.attention import fused
from lightning_mixcn.model.attention import packed as packed_attention
from lightning_mixcn.model.attention.packed import PackedDocuments, pack_documents, serves
from tests.model.attention.varlen import dense_varlen

# A whole row and the front of the next document of the same length; a document that goes on with one begun before.
POSITIONS = torch.tensor([[*range(17), *range(1), *range(22)], [*range(5, 22), *range(23)]])
OFFSETS = [0, 17, 18, 40, 57, 80]


@pytest.fixture
def packed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the CPU take CUDA's way, with `dense_varlen` for torch's kernel."""

    def use() -> None:
        monkeypatch.setattr(attention, "serves", lambda *_: True)
        monkeypatch.setattr(packed_attention, "varlen_attn", dense_varlen)

    return use


def states(heads: int = 4, key_heads: int = 2, size: int = 8, device: str = "cpu", dtype: Any = None) -> list[Tensor]:
    """Query, key and value as the projections give them: views of ``[B, S, heads, size]``."""
    torch.manual_seed(0)
    dtype = dtype or torch.float32
    made = (torch.randn(2, 40, count, size).to(device, dtype) for count in (heads, key_heads, key_heads))
    return [state.transpose(1, 2).detach().requires_grad_() for state in made]


def test_offsets_of_documents() -> None:
    offsets, longest = pack_documents(POSITIONS)
    assert (offsets.tolist(), offsets.dtype, longest) == (OFFSETS, torch.int32, 23)


def test_rows_without_a_boundary_are_documents() -> None:
    """As rows of packing `concatenate` are; the second goes on where the first one ended."""
    offsets, longest = pack_documents(torch.stack([torch.arange(7), torch.arange(7, 14)]))
    assert (offsets.tolist(), longest) == ([0, 7, 14], 7)


def test_offsets_are_those_of_the_spans() -> None:
    generator = torch.Generator().manual_seed(0)
    starts_BS = torch.rand(5, 64, generator=generator) < 0.2
    place_S = torch.arange(64)
    position_BS = place_S - torch.where(starts_BS, place_S, 0).cummax(1).values
    spans = attention.document_spans(position_BS)
    expected = sorted(row * 64 + start for (start, _), rows in spans.items() for row in rows)
    offsets, longest = pack_documents(position_BS)
    assert offsets.tolist() == [*expected, 5 * 64]
    assert longest == max(stop - start for start, stop in spans)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # as a reference it may be slow
@pytest.mark.parametrize("window", [None, 5, 23, 400])
def test_it_equals_flex_attention(window: int | None, packed_on_cpu: Callable[[], None]) -> None:
    """That is torch's other attention over documents; here uncompiled, with grouped queries."""
    packed_on_cpu()
    query, key, value = (state.detach() for state in states())
    documents = pack_documents(POSITIONS)
    document_BS = torch.stack([torch.tensor([0] * 17 + [1] + [2] * 22), torch.tensor([0] * 17 + [1] * 23)])

    def allowed(row: Tensor, head: Tensor, place: Tensor, other: Tensor) -> Tensor:
        near = place - other < (window or 40)
        return (document_BS[row, place] == document_BS[row, other]) & (place >= other) & near

    mask = create_block_mask(allowed, 2, None, 40, 40, device="cpu")
    expected: Any = flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
    found = packed_attention.packed_attention(query, key, value, documents, 0.3, window)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_it_equals_a_call_for_each_document(packed_on_cpu: Callable[[], None]) -> None:
    packed_on_cpu()
    results = []
    module: Any = torch.nn.Module()
    for documents in (pack_documents(POSITIONS), attention.document_spans(POSITIONS)):
        query, key, value = states()
        output, _ = attention.document_attention(module, query, key, value, None, documents, scaling=0.3)
        (output * torch.arange(8.0)).sum().backward()
        results.append([output, query.grad, key.grad, value.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpointing", "kernel"), [("none", False), ("selective", False), ("full", False), ("selective", True)]
)
def test_loss_and_gradients_of_a_model(
    checkpointing: str,
    kernel: bool,
    base: Path,
    ids: Tensor,
    packed_on_cpu: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With RoPE in transformers' steps, and in Triton's interpreter."""
    from lightning_mixcn.model import set_activation_checkpointing

    if kernel and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: set TRITON_INTERPRET=1")
    monkeypatch.setattr(fused, "_runs_triton", lambda _: kernel)
    model = load_mixtral(
        base, quantization="none", dtype="float32", lora=peft.LoraConfig(r=4, target_modules="all-linear")
    )
    set_activation_checkpointing(model, checkpointing)
    model.train()
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, position_ids=POSITIONS)
        out.loss.backward()
        results.append([out.nll.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        packed_on_cpu()  # after the first round, which takes the CPU's own way
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_sliding_window_needs_no_mask(tiny: Path, ids: Tensor, packed_on_cpu: Callable[[], None]) -> None:
    model = load_mixtral(tiny, quantization="none", dtype="float32")
    model.config.sliding_window = 8
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids, position_ids=POSITIONS).nll  # transformers' masks
        packed_on_cpu()
        assert isinstance(attention.locate_documents(POSITIONS, model.config, torch.bfloat16), PackedDocuments)
        torch.testing.assert_close(
            model(input_ids=ids, labels=ids, position_ids=POSITIONS).nll, expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("triton", "packed"), [(True, False), (False, True), (True, True)])
def test_where_rope_is_one_kernel(
    triton: bool, packed: bool, tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With packed documents and Triton; else the whole forward is transformers'."""
    layer: Any = load_mixtral(tiny, quantization="none", dtype="float32").model.layers[0].self_attn
    offsets = PackedDocuments(torch.tensor(OFFSETS, dtype=torch.int32), 23)
    calls: list[str] = []

    def stock(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append("transformers")
        return ids, None

    def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("kernel")
        return query, key

    monkeypatch.setattr(fused, "_runs_triton", lambda _: triton)
    monkeypatch.setattr(MixtralAttention, "forward", stock)
    monkeypatch.setattr(fused._Rotation, "apply", rotated)
    monkeypatch.setattr(packed_attention, "varlen_attn", dense_varlen)
    hidden = torch.zeros(2, 40, layer.q_proj.in_features)
    layer(hidden_states=hidden, position_embeddings=(hidden, hidden), documents=offsets if packed else None)
    assert calls == ["kernel" if triton and packed else "transformers"]


@pytest.mark.parametrize("window", [None, 5])
def test_torch_accepts_the_call(window: int | None) -> None:
    """The real `varlen_attn` and its backward on the meta device, which computes shapes only, with grouped queries."""
    query, key, value = states(device="meta", dtype=torch.bfloat16)
    documents = PackedDocuments(torch.tensor(OFFSETS, dtype=torch.int32, device="meta"), 23)
    output = packed_attention.packed_attention(query, key, value, documents, 0.3, window)
    assert output.shape == (2, 40, 4, 8)
    output.sum().backward()
    assert key.grad is not None
    assert key.grad.shape == (2, 2, 40, 8)


def test_what_it_is_used_for(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    cuda, bfloat16 = torch.device("cuda"), torch.bfloat16
    assert not serves(torch.device("cpu"), bfloat16, 128)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert serves(cuda, bfloat16, 128)
    assert serves(cuda, torch.float16, 256)
    assert not serves(cuda, torch.float32, 128)
    assert not serves(cuda, bfloat16, 264)
    assert not serves(cuda, bfloat16, 100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not serves(cuda, bfloat16, 128)


def test_dropout_of_attention_is_left_to_a_call_for_each_document(
    tiny: Path, packed_on_cpu: Callable[[], None]
) -> None:
    packed_on_cpu()
    config = load_mixtral(tiny, quantization="none").config
    assert isinstance(attention.locate_documents(POSITIONS, config, torch.bfloat16), PackedDocuments)
    config.attention_dropout = 0.1
    assert attention.locate_documents(POSITIONS, config, torch.bfloat16) == attention.document_spans(POSITIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "size"), [(4, 8), (32, 128)])
def test_the_kernel_equals_the_reference(window: int | None, heads: int, size: int) -> None:
    documents = pack_documents(POSITIONS.cuda())
    weight = torch.arange(float(size), device="cuda") / size
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        given = states(heads, heads // 4 or 1, size, "cuda", torch.bfloat16)
        query, key, value = (state.detach().to(dtype).requires_grad_() for state in given)
        if dtype == torch.bfloat16:
            output = packed_attention.packed_attention(query, key, value, documents, 0.3, window)
        else:
            output = reference(query, key, value, 0.3, window)
        (output * weight).sum().backward()
        results.append([output, query.grad, key.grad, value.grad])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        # bfloat16 keeps 8 bits, and a gradient of a key is a sum over up to 40 queries and 8 heads of it.
        difference = (found.double() - expected).norm() / expected.norm()
        assert difference < 0.02


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """`dense_varlen` on the CPU."""
    moved = [state.cpu().transpose(1, 2).flatten(0, 1) for state in (query, key, value)]
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    limits = (-1 if window is None else window - 1, 0)
    output = dense_varlen(*moved, offsets, offsets, 23, 23, scale=scale, window_size=limits)
    return output.view(2, 40, *output.shape[1:]).to(query.device)


@pytest.mark.gpu
def test_a_model_s_loss_on_the_gpu(tiny: Path, ids: Tensor) -> None:
    results = []
    for implementation in (attention.NAME, "eager"):
        model = load_mixtral(tiny, quantization="none", dtype="bfloat16", device="cuda")
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(input_ids=ids.cuda(), labels=ids.cuda(), position_ids=POSITIONS.cuda()).nll)
    # A mean, since bfloat16 may choose another expert for a token.
    assert (results[0] - results[1]).abs().mean() < 0.02
