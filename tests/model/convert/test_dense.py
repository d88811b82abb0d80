"""What an upcycling accepts as its source, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_mixcn.model.convert.upcycle import open_dense

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, remove: str = "", **additions: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(remove, None)
    save_file(
        tensors | {name.replace("__", "."): tensor for name, tensor in additions.items()}, folder / "model.safetensors"
    )


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match="`src=") as caught:
        open_dense(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_and_tensors(folder: Path) -> None:
    source = open_dense(str(folder))
    stored = load_file(folder / "model.safetensors")
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in stored.items())
    assert next(iter(source.shapes)) == "model.embed_tokens.weight"
    assert list(source.shapes)[-1] == "lm_head.weight"
    assert source.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2', expected a dense model of type llama, mistral or qwen3. Give"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts cannot be upcycled again"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "which a Mixtral cannot express. Give a plain, unquantised",
        ),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "swishy"}, "hidden_act='swishy'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', expected a whole number"),
        ({"num_attention_heads": 5}, "num_key_value_heads is 2, expected a divisor of num_attention_heads=5"),
        ({"vocab_size": 41}, r"'model.embed_tokens.weight' has shape \[40, 32\], its config says \[41, 32\]"),
        ({"num_hidden_layers": 3}, r"'model\.layers\.2\.input_layernorm\.weight' is missing"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\..*' has no place in a Mixtral"),
    ],
)
def test_configs_that_mixtral_cannot_express(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_dense(folder)
    assert "\n" not in str(caught.value)


def test_a_bias_that_the_config_does_not_declare(folder: Path) -> None:
    edit_weights(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(32))
    assert "'model.layers.0.self_attn.q_proj.bias' has no place in a Mixtral" in refusal(folder)


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12)).save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True in its config, which a Qwen3-MoE cannot express"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"head_dim": 8}, r"'model.layers.0.self_attn.q_proj.weight' has shape \[48, 32\], its config says \[32, 32\]"),
        ({"model_type": "mistral", "architectures": None}, r"self_attn.[qk]_norm.weight' has no place in a Mixtral"),
    ],
)
def test_configs_that_qwen3_moe_cannot_express(qwen3: Path, changes: dict[str, object], message: str) -> None:
    assert open_dense(qwen3).shapes["model.layers.1.self_attn.k_norm.weight"] == (12,)
    edit_config(qwen3, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_dense(qwen3)
    assert "\n" not in str(caught.value)


def test_norms_that_are_missing(qwen3: Path) -> None:
    edit_weights(qwen3, remove="model.layers.1.self_attn.q_norm.weight")
    assert "'model.layers.1.self_attn.q_norm.weight' is missing" in refusal(qwen3)


def test_a_missing_tensor(folder: Path) -> None:
    edit_weights(folder, remove="model.layers.1.mlp.up_proj.weight")
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in refusal(folder)


def test_integer_weights(folder: Path) -> None:
    edit_weights(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(48, 32, dtype=torch.int8))
    assert "has dtype torch.int8, expected float32, float16 or bfloat16" in refusal(folder)


def test_old_rotary_buffers_are_ignored(folder: Path) -> None:
    edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert not any("inv_freq" in name for name in open_dense(folder).shapes)


def test_tied_matrices_that_are_both_stored(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    differing = open_dense(folder)  # transformers warns and does not tie them
    assert differing.config.tie_word_embeddings is False
    assert "lm_head.weight" in differing.shapes
    edit_weights(folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone())
    equal = open_dense(folder)
    assert equal.config.tie_word_embeddings is True
    assert "lm_head.weight" not in equal.shapes


def test_rope_of_older_configs(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    scaling = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": scaling}))
    assert open_dense(folder).config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not there"):
        open_dense(tmp_path / "none")


def test_folder_of_gguf_files_says_to_give_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"folder of GGUF files. Give one of the files, e\.g\. '.*model\.gguf'"):
        open_dense(tmp_path)
