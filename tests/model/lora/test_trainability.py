"""Groups of rows, whole and as ranks hold them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn.model import build_mixtral
from lightning_mixcn.model.lora.trainability import GradientArrivals, fingerprints, nonzero_groups, trained_tensors
from lightning_mixcn.testing import tiny_mixtral_config


def rows(*nonzero: int) -> Tensor:
    """Twelve rows, that is four groups of three."""
    tensor = torch.zeros(12, 5)
    for row in nonzero:
        tensor[row, row % 5] = -0.5
    return tensor


def test_groups() -> None:
    assert nonzero_groups(rows(0, 1, 8), 4).tolist() == [1, 0, 1, 0]
    assert nonzero_groups(rows(11) * float("nan"), 4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 16])
def test_shares_of_ranks_add_up(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut as FSDP2 does: 5 ranks have 3, 3, 3, 3 and 0 rows."""
    whole, size = rows(2, 3, 11), -(-12 // ranks)
    found = torch.zeros(4, dtype=torch.int64)
    for rank in range(ranks):
        first = min(rank * size, 12)
        share = whole[first : first + size]
        monkeypatch.setattr("lightning_mixcn.model.lora.trainability.local_shard", lambda _, s=share, f=first: (s, f))
        found += nonzero_groups(whole, 4)
    assert found.sign().tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_what_should_train(tied: bool) -> None:
    config = tiny_mixtral_config(tie_word_embeddings=tied)
    model = build_mixtral(
        config, lora=LoraConfig(r=2, target_modules=["q_proj", "w2"]), device="meta", train_embeddings=True
    )
    tensors = list(trained_tensors(model, train_embeddings=True))
    names = [name for tensor in tensors for name in tensor.names]
    per_layer = [("self_attn.q_proj", 1), ("block_sparse_moe.experts.{}.w2", 4)]
    expected = [
        f"model.layers.{layer}.{name.format(group)}.lora_{factor}"
        for layer in range(2)
        for name, groups in per_layer
        for factor in "BA"
        for group in range(groups)
    ]
    assert sorted(names) == sorted(expected + ["model.embed_tokens"] + [] * tied + ["lm_head"] * (not tied))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(tensor.parameter) for tensor in tensors} == trained
    assert {tensor.names[0].endswith("lora_A") for tensor in tensors if tensor.after is not None} == {True}


def test_arrivals_are_of_tokens_that_the_loss_needs() -> None:
    """The last layer's experts learn from the one scored token only; the first one's from those before it, too."""
    model: Any = build_mixtral(
        tiny_mixtral_config(), quantization="none", dtype="float32", lora=LoraConfig(r=2, target_modules=["w1"])
    )
    arrivals = GradientArrivals(model)
    ids = torch.arange(3, 13)[None]
    labels = torch.where(torch.arange(10) == 6, ids, -100)
    for counting, expected in ((False, []), (True, [6 * 2, 1 * 2])):
        arrivals.counting = counting
        model(input_ids=ids, labels=labels).loss.backward()
        assert [int(counts.sum()) for counts in arrivals.take().values()][::-1] == expected
    arrivals.close()
    model(input_ids=ids, labels=labels).loss.backward()
    assert not arrivals.take()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 13, 8192, 5 * 8192 + 3])
def test_one_bit(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randint(0, 200, (size,)).to(dtype)
    before = fingerprints([tensor, torch.ones(3)])
    for place in (0, size // 2, size - 1):
        bits = tensor.view(torch.uint8)
        position = place * tensor.element_size()
        bits[position] ^= 1
        assert (fingerprints([tensor, torch.ones(3)]) != before).tolist() == [True, False]
        bits[position] ^= 1
    assert torch.equal(fingerprints([tensor, torch.ones(3)]), before)


def test_exchanged_superblocks() -> None:
    codes = torch.arange(2, dtype=torch.uint8)[:, None].expand(2, 8192).clone()
    assert fingerprints([codes]) != fingerprints([codes.flip(0)])


def test_a_view_that_is_not_aligned() -> None:
    values = torch.arange(100, dtype=torch.uint8)[3:]
    before = fingerprints([values])
    values[50] += 1
    assert fingerprints([values]) != before


def test_no_tensors() -> None:
    assert fingerprints([]).shape == (0,)
