"""Folders as transformers 4 saved them with bitsandbytes, written here by bitsandbytes' own functions."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mixcn.cli import main
from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.quantize import quantize
from lightning_mixcn.testing import save_tiny_mixtral

SETTINGS: dict[str, Any] = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
}  # fmt: skip
# Every matrix, the router's of 8 × 2048 too, is of whole superblocks; and no row is shorter than a block of 64, which
# bitsandbytes 0.50.2 decodes wrong on the CPU.
SIZES: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "num_local_experts": 8,
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder in 4 bits, the router included as transformers 4 did; and what bitsandbytes decodes of each weight."""
    return quantised(save_tiny_mixtral(tmp_path / "base", **SIZES), tmp_path / "source")


def quantised(base: Path, folder: Path, **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    tensors, decoded = {}, {}
    for name, values in load_file(base / "model.safetensors").items():
        if "proj" in name or "block_sparse_moe" in name:
            packed, state = bnb.quantize_4bit(
                values.bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            decoded[name] = bnb.dequantize_4bit(packed, state)
            tensors[name] = packed
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        else:
            tensors[name] = decoded[name] = values.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": SETTINGS | changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, decoded


def test_every_weight_is_bit_for_bit_what_bitsandbytes_decodes(
    source: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, decoded = source
    quantize(str(folder), str(tmp_path / "out"))
    model: Any = load_mixtral(tmp_path / "out")
    for name, expected in decoded.items():
        layer, _, rest = name.removesuffix(".weight").partition(".block_sparse_moe.")
        if rest.startswith("experts."):
            _, expert, leaf = rest.split(".")
            ours = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[leaf]
            module = model.get_submodule(f"{layer}.mlp.experts.{ours}")
            found = module.storage.decoder(torch.bfloat16)(int(expert))
        elif rest == "gate":
            found = model.get_submodule(f"{layer}.mlp.gate.linear").storage.decoder(torch.bfloat16)(0)
        elif "_proj" in layer:
            found = model.get_submodule(layer).storage.decoder(torch.bfloat16)(0)
        else:
            found = model.get_submodule(layer).weight
        assert torch.equal(found, expected), name


def test_codes_and_scales_are_copied(source: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = source
    quantize(str(folder), str(tmp_path / "out"))
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    weights = [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(8)]
    storage = "model.layers.0.mlp.experts.down_proj.storage"
    for mine, key in {"codes": "", "scales": ".absmax", "super_scale": ".nested_absmax"}.items():
        copied = torch.cat([theirs[f"{weight}{key}"].flatten() for weight in weights])
        assert torch.equal(ours[f"{storage}.{mine}"].flatten(), copied), mine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4', expected 'nf4'"),
        ({"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant=False, expected True"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit=False, expected True"),
    ],
)
def test_other_formats_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    folder, _ = quantised(save_tiny_mixtral(tmp_path / "base"), tmp_path / "source", **changes)
    capsys.readouterr()
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_matrices_of_no_whole_superblocks_are_refused(tmp_path: Path) -> None:
    folder, _ = quantised(save_tiny_mixtral(tmp_path / "base"), tmp_path / "source")
    with pytest.raises(ValueError, match="no multiple of 16,384"):
        quantize(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
