"""Folders as transformers 4 saved them with bitsandbytes, written here by bitsandbytes' own functions."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mixcn.cli import main
from lightning_mixcn.errors import UserError
from lightning_mixcn.model import find_model, load_found, load_mixtral
from lightning_mixcn.model.architectures import MODEL_TYPES, architecture_named
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral, save_tiny_model
from tests.model.adapters_on_disk import save_adapter
from tests.model.export.test_folder import logits_of, stock_logits

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


EVERY_FAMILY = pytest.mark.parametrize("source", MODEL_TYPES, indirect=True)


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return a folder in 4 bits, router included as in transformers 4, and the weights that bitsandbytes decodes."""
    family = getattr(request, "param", "mixtral")
    names = {"intermediate_size": architecture_named(family).expert_width}
    if family != "mixtral":
        names["num_local_experts"] = "num_experts"
    sizes = {names.get(name, name): size for name, size in SIZES.items() if family != "olmoe" or name != "head_dim"}
    return quantised(save_tiny_model(tmp_path / "base", family, **sizes), tmp_path / "source")


def quantised(base: Path, folder: Path, **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    tensors, decoded = {}, {}
    for name, values in load_file(base / "model.safetensors").items():
        if "proj" in name or "block_sparse_moe" in name or ".mlp.gate." in name:
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


def in_float32(name: str, stored: dict[str, Tensor]) -> Tensor:
    parts = {key.removeprefix(f"{name}."): part for key, part in stored.items() if key.startswith(f"{name}.")}
    if not parts:
        return stored[name].float()
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    return bnb.dequantize_4bit(stored[name], state)


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


STATE = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        (STATE, torch.tensor(list(b"{"), dtype=torch.uint8), "is not valid JSON"),
        (STATE, torch.tensor(list(b'{"shape": [1]}'), dtype=torch.uint8), "shape has 1 entries, expected 2"),
        (STATE, torch.tensor(list(b'{"shape": [1, -2]}'), dtype=torch.uint8), r"shape\[1\] is -2, expected a whole"),
        ("absmax", torch.zeros(3, dtype=torch.uint8), "absmax has 3 bytes, expected"),
        ("quant_map", torch.zeros(2), "quant_map has 8 bytes, expected 64"),
        ("nested_absmax", torch.zeros(()), "nested_absmax has 4 bytes, expected"),
    ],
)
def test_damaged_parts_are_one_line(
    part: str, tensor: Tensor, message: str, source: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    file = source[0] / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"w1.weight.{part}"))
    save_file(tensors | {name: tensor}, file)
    with pytest.raises(UserError, match=message):
        quantize(str(source[0]), str(tmp_path / "out"))


@EVERY_FAMILY
def test_a_folder_is_a_base_bit_for_bit(source: tuple[Path, dict[str, Tensor]], tmp_path: Path, ids: Tensor) -> None:
    folder, decoded = source
    quantize(str(folder), str(tmp_path / "small"), dtype="float32")
    ours: Any = load_mixtral(folder, dtype="float32", lora=peft.LoraConfig(r=2, target_modules="all-linear"))
    expected = load_mixtral(tmp_path / "small", dtype="float32").state_dict()
    found = ours.get_base_model().state_dict()
    for name, tensor in expected.items():
        adapted = name.replace(".storage.", ".base_layer.storage.")
        assert torch.equal(found[adapted], tensor), name
    # Stock transformers with what bitsandbytes decodes. In float32: bfloat16 would send some tokens to other experts.
    (tmp_path / "decoded").mkdir()
    stored = load_file(folder / "model.safetensors")
    weights = {name: in_float32(name, stored) for name in decoded}
    save_file(weights, tmp_path / "decoded/model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "decoded/config.json").write_text(json.dumps(settings))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.float32)
    torch.testing.assert_close(logits_of(ours, ids), logits_of(theirs, ids), rtol=1e-3, atol=1e-3)


@EVERY_FAMILY
def test_a_run_on_a_folder_is_used_and_exported_dequantised(
    source: tuple[Path, dict[str, Tensor]], tmp_path: Path, ids: Tensor
) -> None:
    folder, _ = source
    trained = save_adapter(folder, tmp_path / "adapter", quantization="nf4")
    expected = logits_of(trained, ids)
    again = load_found(find_model(str(tmp_path / "adapter")), dtype="float32")
    torch.testing.assert_close(logits_of(again, ids), expected, rtol=1e-4, atol=1e-4)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), base="dequantised", dtype="float32")
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(FileNotFoundError, match=r"is in 4 bits, .*`--base dequantised`"):
        export(str(tmp_path / "adapter"), str(tmp_path / "no"))
    quantize(str(folder), str(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"which bitsandbytes quantised: .*`--base dequantised`"):
        export(str(tmp_path / "small"), str(tmp_path / "no"))
    with pytest.raises(ValueError, match="holds 4-bit weights"):
        load_mixtral(folder, quantization="none")
