"""What is read of an adapter's folder, and which folders are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.model.lora.adapter_file import AdapterFile
from tests.model.adapters_on_disk import write_by_hand

SIZES = {"kv": 4, "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6}
PREFIX = "base_model.model."
W1 = "model.layers.0.block_sparse_moe.experts.1.w1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_by_hand(Path("base"), tmp_path / "adapter", SIZES | {"num_hidden_layers": 2, "num_local_experts": 3})
    return tmp_path / "adapter"


def change(folder: Path, **settings: Any) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def test_names_shapes_and_values(folder: Path) -> None:
    adapter = AdapterFile(folder, architecture_named("mixtral"))
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(adapter.names) == 2 * (2 + 3 * 3)
    assert adapter.saved == ["model.embed_tokens", "lm_head"]
    assert (adapter.rank(W1), adapter.shape(W1), adapter.shape("lm_head")) == (3, (6, 8), (11, 8))
    a, b = (stored[f"{PREFIX}{W1}.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close(adapter.delta(W1), 7 / 3 * b.float() @ a.float())
    assert torch.equal(adapter.read_saved("lm_head"), stored[f"{PREFIX}lm_head.weight"])


def test_scaling_of_single_projections_and_rslora(folder: Path) -> None:
    change(folder, alpha_pattern={"w1": 9})
    assert AdapterFile(folder, architecture_named("mixtral")).factors(W1).scaling == 9 / 3
    assert AdapterFile(folder, architecture_named("mixtral")).factors(W1.replace("w1", "w2")).scaling == 7 / 3
    change(folder, use_rslora=True)
    assert AdapterFile(folder, architecture_named("mixtral")).factors(W1).scaling == pytest.approx(9 / 3**0.5)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        AdapterFile(folder, architecture_named("mixtral"))


def without_b(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{PREFIX}{W1}.lora_B.weight"]


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}{W1}.lora_A.weight"][0, 0] = torch.nan


def magnitude(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}{W1}.lora_magnitude_vector"] = torch.ones(6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [(without_b, "has no .*lora_B"), (nan, "holds NaN or infinite"), (magnitude, "neither a LoRA factor nor")],
)
def test_broken_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        AdapterFile(folder, architecture_named("mixtral")).factors(W1)


def test_other_methods(folder: Path) -> None:
    change(folder, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True, which is not supported"):
        AdapterFile(folder, architecture_named("mixtral"))
    peft.IA3Config(target_modules=["w1"], feedforward_modules=["w1"]).save_pretrained(str(folder))
    with pytest.raises(ValueError, match="is of type IA3"):
        AdapterFile(folder, architecture_named("mixtral"))
