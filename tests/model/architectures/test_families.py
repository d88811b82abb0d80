"""Every family against stock transformers and PEFT, with the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lightning_mixcn import build_moe, load_moe
from lightning_mixcn.cli import main
from lightning_mixcn.errors import UserError
from lightning_mixcn.model import bytes_in_memory, count_parameters, find_model, load_found
from lightning_mixcn.model.architectures import MODEL_TYPES, architecture_named
from lightning_mixcn.testing import save_tiny_model, tiny_config

# An odd number of experts of odd width, most of which no token of a short text chooses.
MANY = {"num_experts_per_tok": 8, "num_hidden_layers": 1}
FEW: dict[str, Any] = {}
SIZES = [FEW, MANY]
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]}
# PEFT's own conversion leaves patterns for what is not adapted, and asks transformers for an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def sizes_of(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    experts = "num_local_experts" if family == "mixtral" else "num_experts"
    return sizes | ({experts: 31, architecture_named(family).expert_width: 24} if sizes is MANY else {})


@pytest.fixture(scope="module", params=[(family, sizes) for family in MODEL_TYPES for sizes in SIZES], ids=str)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model of each family, written by stock transformers, one matrix an expert."""
    family, sizes = request.param
    return save_tiny_model(tmp_path_factory.mktemp("base"), family, **sizes_of(family, sizes))


@pytest.fixture(params=MODEL_TYPES)
def family_base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base", request.param)


def stock_model(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """MKL splits the fused and the single products of the experts differently over several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def test_logits_losses_and_routers_are_transformers(base: Path, ids: Tensor) -> None:
    stock, model = stock_model(base), load_moe(base, quantization="none", dtype="float32")
    assert isinstance(model, type(stock))
    theirs = stock(input_ids=ids, labels=ids, output_router_logits=True)
    ours = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert (model(input_ids=ids).logits - theirs.logits).abs().max() < 1e-6
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-6, atol=1e-6)
    for found, expected in zip(ours.router_logits, theirs.router_logits, strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_four_bits_are_bitsandbytes_round_trip(
    base: Path, ids: Tensor, bitsandbytes_roundtrip: Callable[[Tensor, torch.dtype], Tensor]
) -> None:
    stock = stock_model(base)
    for layer in stock.model.layers:
        attention = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo"]
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        for weight in [*attention, gate, up, layer.mlp.experts.down_proj]:
            weight.copy_(bitsandbytes_roundtrip(weight.flatten(), torch.float32).view_as(weight))
    expected = stock(input_ids=ids).logits
    assert (load_moe(base, dtype="float32")(input_ids=ids).logits - expected).abs().max() < 1e-5


def test_greedy_generation_and_documents_of_a_row(family_base: Path, ids: Tensor) -> None:
    stock: Any = stock_model(family_base)
    model: Any = load_moe(family_base, quantization="none", dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    ours, theirs = (generating.generate(ids[:1, :9], **options) for generating in (model, stock))
    assert ours.tolist() == theirs.tolist()
    first, second = ids[:1, :17], ids[1:, :23]
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    row = torch.cat([first, second], 1)
    packed = model(input_ids=row, labels=row, position_ids=positions).nll
    torch.testing.assert_close(packed[:, 18:], model(input_ids=second, labels=second).nll[:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, :17], model(input_ids=first, labels=first).nll, rtol=1e-5, atol=1e-5)


def test_both_layouts_load_alike(family_base: Path, tmp_path: Path, ids: Tensor) -> None:
    assert main(["export", str(family_base), str(tmp_path / "fused"), "--layout", "fused"]) == 0
    apart, fused = (
        load_moe(folder, dtype="float32")(input_ids=ids).logits for folder in (family_base, tmp_path / "fused")
    )
    assert torch.equal(apart, fused)
    assert torch.equal(
        stock_model(tmp_path / "fused")(input_ids=ids).logits, stock_model(family_base)(input_ids=ids).logits
    )


@torch.no_grad()
def test_an_adapter_is_the_same_in_stock_peft_and_merged(family_base: Path, tmp_path: Path, ids: Tensor) -> None:
    lora = peft.LoraConfig(**LORA, init_lora_weights=False)  # type: ignore[arg-type]  # values of several types
    model: Any = load_moe(family_base, quantization="none", dtype="float32", lora=lora)
    expected = model(input_ids=ids).logits
    assert (expected - stock_model(family_base)(input_ids=ids).logits).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    exports = {"peft": [], "peft-per-expert": [], "hf": ["--layout", "per-expert"]}
    for name, options in exports.items():
        assert main(["export", str(tmp_path / "adapter"), str(tmp_path / name), "--format", name, *options]) == 0
    for name in ("adapter", "peft", "peft-per-expert"):
        read = peft.PeftModel.from_pretrained(stock_model(family_base), tmp_path / name)
        torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        again = load_found(find_model(str(tmp_path / name)), quantization="none", dtype="float32")
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(stock_model(tmp_path / "hf")(input_ids=ids).logits, expected, rtol=0, atol=2e-5)


def test_an_adapter_that_stock_peft_trained_is_read(family_base: Path, tmp_path: Path, ids: Tensor) -> None:
    parameters = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, lora_dropout=0.0
    )
    trained: Any = peft.get_peft_model(stock_model(family_base), config)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(stored | {"base_model_name_or_path": str(family_base)})
    )
    found = load_found(find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
    torch.testing.assert_close(found(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_four_bit_folder_is_the_base_in_four_bits(family_base: Path, tmp_path: Path, ids: Tensor) -> None:
    assert main(["quantize", str(family_base), str(tmp_path / "nf4"), "--dtype", "float32"]) == 0
    whole, packed = (
        load_moe(folder, dtype="float32")(input_ids=ids).logits for folder in (family_base, tmp_path / "nf4")
    )
    assert torch.equal(whole, packed)
    with pytest.raises(ValueError, match="mixcn_nf4_"):  # which transformers does not take for a model of its own
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")


# transformers' names of the published sizes; billions of weights in 4 bits, of LoRA on the experts, and bytes.
REAL: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 8, "vocab_size": 32000,
    },
    "olmoe": {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
    },
    "qwen3_moe": {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "rank", "billions", "gigabytes"),
    [
        ("mixtral", 64, 0.91, 24.5),
        ("olmoe", 64, 0.60, 3.9),
        ("qwen3_moe", 64, 3.32, 16.7),
        ("qwen3_moe", 8, 0.42, 16.7),
    ],
)
def test_sizes_of_the_published_models(family: str, rank: int, billions: float, gigabytes: float) -> None:
    config = tiny_config(family, **REAL[family])
    model = build_moe(config, lora=peft.LoraConfig(r=rank, target_modules=["w1", "w2", "w3"]), device="meta")
    width = getattr(config, architecture_named(family).expert_width)
    matrices = 3 * config.num_hidden_layers * config.num_local_experts
    trained, sizes = count_parameters(model)["trainable"], bytes_in_memory(model)
    assert trained == matrices * rank * (config.hidden_size + width)
    assert round(trained / 1e9, 2) == billions
    assert round((sizes["quantised"] + sizes["dense"]) / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"model_type": "qwen2_moe"}, "type 'qwen2_moe'. Expected mixtral, olmoe or qwen3_moe"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1], which is not supported. Expected None or []"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2, which is not supported. Expected None or 1"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64, which is not"),
        ("olmoe", {"attention_bias": True}, "attention_bias=True, which is not supported. Expected None or False"),
    ],
)
def test_what_no_family_has_is_refused_in_one_line(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_model(tmp_path / "base", family)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    capsys.readouterr()
    assert main(["quantize", str(base), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("olmoe", "model.layers.0.block_sparse_moe.gate"),
        ("qwen3_moe", "block_sparse_moe.experts.3.w1"),
        ("mixtral", "w4"),
    ],
)
def test_targets_of_another_family_are_refused(family: str, target: str) -> None:
    lora = peft.LoraConfig(target_modules=[target])
    with pytest.raises(UserError, match=f"names '{target}', which matches nothing in this model") as caught:
        build_moe(tiny_config(family), lora=lora, device="meta")
    assert all(f"{name}," in str(caught.value) for name in architecture_named(family).short_names)


@torch.no_grad()
def test_olmoe_clips_queries_keys_and_values(tmp_path: Path, ids: Tensor) -> None:
    base = save_tiny_model(tmp_path / "base", "olmoe", clip_qkv=0.1)
    expected = stock_model(base)(input_ids=ids).logits
    model = load_moe(base, quantization="none", dtype="float32")
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-6
    assert (stock_model(save_tiny_model(tmp_path / "free", "olmoe"))(input_ids=ids).logits - expected).abs().max() > 0.1
