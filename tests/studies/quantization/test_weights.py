"""Sizes by hand, and weights against bitsandbytes' own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.studies.quantization.weights import (
    relative_error,
    round_singly,
    rounded_names,
    single_sizes,
    sizes_in_memory,
)
from lightning_mixcn.testing import save_tiny_mixtral
from tests.studies.experts.stock_experts import stock_model
from tests.studies.rounded_mixtral import rounded_stock_model, save_whole_superblocks

ROUNDED = 2 * (4 + 3 * 4) * 128 * 128  # layers × (attention + projections × experts)
OTHERS = 2 * 272 * 128 + 5 * 128 + 2 * 4 * 128  # embedding and head, norms, routers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole_superblocks(tmp_path_factory.mktemp("whole") / "base")


def load(base: Path, quantization: str, dtype: str = "float32") -> Any:
    return load_mixtral(base, quantization=quantization, dtype=dtype)


def test_what_is_rounded(base: Path) -> None:
    names = rounded_names(Checkpoint(base))
    assert len(names) == 2 * (4 + 3)
    assert not [name for name in names if "gate.linear" in name or "head" in name]


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_sizes_are_those_of_hand_arithmetic(base: Path, dtype: str, itemsize: int) -> None:
    checkpoint = Checkpoint(base)
    dense, double = load(base, "none", dtype), load(base, "nf4", dtype)
    found = sizes_in_memory(dense, checkpoint)
    assert found == (itemsize * (ROUNDED + OTHERS), ROUNDED + OTHERS, itemsize * ROUNDED, ROUNDED)
    found = sizes_in_memory(double, checkpoint)
    assert 8 * found.quantised_bytes / found.quantised_weights == 4 + 8 / 64 + 64 / 16384
    assert found.bytes == found.quantised_bytes + itemsize * OTHERS
    found = single_sizes(dense, checkpoint)
    assert 8 * found.quantised_bytes / found.quantised_weights == 4.5
    assert (found.bytes, found.weights) == (ROUNDED * 4.5 / 8 + itemsize * OTHERS, ROUNDED + OTHERS)


def test_what_a_superblock_is_filled_up_with_counts(tmp_path: Path) -> None:
    """The usual tiny model: 1,024 weights of a q_proj take a whole superblock of 8,456 bytes."""
    checkpoint = Checkpoint(save_tiny_mixtral(tmp_path / "base"))
    model = load(tmp_path / "base", "nf4")
    assert sizes_in_memory(model, checkpoint).quantised_bytes == 2 * (4 + 3) * 8456


def test_rounded_singly_are_bitsandbytes_weights(base: Path) -> None:
    model, expected = load(base, "none"), rounded_stock_model(base, double=False).state_dict()
    round_singly(model, Checkpoint(base))
    layer = model.model.layers[1]
    attention = layer.self_attn.k_proj.storage.flat(torch.float32)
    assert torch.equal(attention, expected["model.layers.1.self_attn.k_proj.weight"].flatten())
    down = layer.mlp.experts.down_proj.storage.flat(torch.float32)
    assert torch.equal(down, expected["model.layers.1.mlp.experts.down_proj"].flatten())
    up = layer.mlp.experts.up_proj.storage.flat(torch.float32).view(4, 128, 128)
    assert torch.equal(up, expected["model.layers.1.mlp.experts.gate_up_proj"][:, 128:])


@pytest.mark.parametrize("double", [False, True])
def test_relative_error_is_that_of_bitsandbytes_weights(base: Path, double: bool) -> None:
    checkpoint, model = Checkpoint(base), load(base, "nf4" if double else "none")
    if not double:
        round_singly(model, checkpoint)
    exact, rounded = stock_model(base).state_dict(), rounded_stock_model(base, double=double).state_dict()
    names = [name for name in exact if "self_attn" in name or ".experts." in name]
    wrong = sum(float((rounded[name] - exact[name]).double().square().sum()) for name in names)
    total = sum(float(exact[name].double().square().sum()) for name in names)
    assert relative_error(model, checkpoint, torch.float32) == pytest.approx((wrong / total) ** 0.5, rel=1e-6)


def test_a_dense_model_has_the_error_of_its_type(base: Path) -> None:
    checkpoint = Checkpoint(base)
    assert relative_error(load(base, "none"), checkpoint, torch.float32) == 0
    # bfloat16 keeps 8 bits: an error of up to 2^-9 of each weight.
    assert 0.001 < relative_error(load(base, "none", "bfloat16"), checkpoint, torch.bfloat16) < 2**-9
