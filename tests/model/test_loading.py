"""Loading: both namings, quantisation against bitsandbytes, and every way a folder can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig

from lightning_mixcn.model import (
    build_mixtral,
    count_parameters,
    load_mixtral,
)
from lightning_mixcn.model.checkpoints import reading
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.testing import save_tiny_mixtral, tiny_mixtral_config


@torch.no_grad()
def test_nf4_equals_stock_model_with_bitsandbytes_weights(
    base: Path, ids: Tensor, bitsandbytes_roundtrip: Callable[[Tensor, torch.dtype], Tensor]
) -> None:
    def replace(weight: Tensor) -> None:
        weight.copy_(bitsandbytes_roundtrip(weight.reshape(-1), torch.float32).view_as(weight))

    stock = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for layer in stock.model.layers:
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            replace(getattr(layer.self_attn, projection).weight)
        experts, intermediate = layer.mlp.experts, stock.config.intermediate_size
        replace(experts.gate_up_proj[:, :intermediate])
        replace(experts.gate_up_proj[:, intermediate:])
        replace(experts.down_proj)
    ours = load_mixtral(base, quantization="nf4", dtype="float32")(input_ids=ids).logits
    torch.testing.assert_close(ours, stock(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_per_expert_and_fused_names_load_alike(tmp_path: Path, ids: Tensor) -> None:
    model = transformers.MixtralForCausalLM(tiny_mixtral_config()).eval()
    expected = model(input_ids=ids).logits
    for style, original_names in (("per-expert", True), ("fused", False)):
        model.save_pretrained(tmp_path / style, save_original_format=original_names)
        names = load_file(tmp_path / style / "model.safetensors").keys()
        assert any("experts.0.w1" in name for name in names) == (style == "per-expert")
        loaded = load_mixtral(tmp_path / style, quantization="none", dtype="float32")
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_bytes_that_need_no_conversion_go_straight_into_the_parameters(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(*args: object) -> None:
        raise AssertionError("a tensor was read and then copied")

    quantize(str(tiny), str(tmp_path / "out"), dtype="float32")
    expected = load_mixtral(tiny, dtype="float32").state_dict()
    monkeypatch.setattr(reading, "write_to_shard", copy)
    found = load_mixtral(tmp_path / "out", dtype="float32").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(AssertionError, match="read and then copied"):
        load_mixtral(tmp_path / "out", dtype="bfloat16")


def test_sharded_and_tied_checkpoints_load(tmp_path: Path, ids: Tensor) -> None:
    model = transformers.MixtralForCausalLM(tiny_mixtral_config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_mixtral(tmp_path, quantization="none", dtype="float32")
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_build_is_deterministic_and_works_on_meta() -> None:
    config = tiny_mixtral_config()
    one, again, other = (build_mixtral(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    meta = build_mixtral(config, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert count_parameters(meta) == count_parameters(build_mixtral(config))


def mixtral_8x7b() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip


def test_counts_at_the_size_of_mixtral_8x7b() -> None:
    paper = peft.LoraConfig(r=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"])
    assert count_parameters(build_mixtral(mixtral_8x7b(), lora=paper, device="meta"))["trainable"] == 968_900_608
    full = build_mixtral(mixtral_8x7b(), lora=paper, device="meta", train_embeddings=True)
    assert count_parameters(full)["trainable"] == 1_231_044_608
    assert count_parameters(build_mixtral(mixtral_8x7b(), device="meta"))["total"] == 46_702_792_704


def test_trained_embeddings_are_float32_masters(tiny: Path, ids: Tensor) -> None:
    model = load_mixtral(tiny, train_embeddings=True)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert weight.dtype == torch.float32
        assert weight.grad is not None
        assert weight.grad.any()


def test_identity_follows_the_content(tiny: Path, tmp_path: Path) -> None:
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert Checkpoint(tiny).sha256 == Checkpoint(moved).sha256 != Checkpoint(other).sha256


def rewrite(source: Path, out: Path, **changes: Any) -> Path:
    """Return a copy of a folder with some tensors changed; None removes one."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def test_missing_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = rewrite(tiny, tmp_path / "x", **{W1: None})
    with pytest.raises(
        ValueError, match=r"lacks the tensor model\.layers\.1\.block_sparse_moe\.experts\.2\.w1\.weight"
    ):
        load_mixtral(folder)


def test_wrong_shape_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = rewrite(tiny, tmp_path / "x", **{W1: torch.zeros(5, 32)})
    with pytest.raises(ValueError, match=r"wrong shape .*experts\.gate_proj"):
        load_mixtral(folder)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nan_in_a_weight_is_named(device: str, tiny: Path, tmp_path: Path) -> None:
    """A GPU looks for it itself."""
    folder = rewrite(tiny, tmp_path / "x", **{W1: torch.full((48, 32), float("nan"))})
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_mixtral(folder, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "mixcn upcycle"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
    ],
)
def test_unsuitable_folder_is_refused(tiny: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_mixtral(folder)


def test_options_are_checked(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nf4' or 'none'"):
        load_mixtral(tiny, quantization="int8")
    with pytest.raises(ValueError, match="bfloat16"):
        load_mixtral(tiny, dtype="fp8")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        load_mixtral(tiny, adapter=tmp_path)
    with pytest.raises(FileNotFoundError):
        load_mixtral(tmp_path / "nowhere")
