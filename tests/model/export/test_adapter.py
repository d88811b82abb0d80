"""Exported adapters in stock PEFT on stock transformers, in both layouts, and read back by us."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lightning_mixcn.model import find_model, load_found, load_mixtral
from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.lora.adapter_file import AdapterFile
from lightning_mixcn.testing import save_tiny_mixtral, tiny_mixtral_config
from tests.model.adapters_on_disk import save_adapter, write_by_hand
from tests.model.checkpoints.transformers4 import NamesOfTransformers4
from tests.model.export.test_folder import LORAS, logits_of, stock_logits

assert_close = partial(
    torch.testing.assert_close, rtol=1e-4, atol=1e-4
)  # float32; PEFT multiplies A and B in another order
pytestmark = [
    # Its conversion of w1 and w3 to the fused layout leaves patterns for what is not adapted.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def peft_logits(base: Path, adapter: Path, ids: Tensor) -> Tensor:
    stock = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits_of(peft.PeftModel.from_pretrained(stock, str(adapter)), ids)


@pytest.mark.parametrize("layout", ["peft", "peft-per-expert"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
# Of layers that are not adapted: PEFT adapts experts of all layers, and starts the others at zero.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_stock_peft_gives_the_trained_models_logits(
    tiny: Path, ids: Tensor, tmp_path: Path, lora: dict[str, Any], layout: Any
) -> None:
    trained = save_adapter(tiny, tmp_path / "adapter", **lora)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), format=layout)
    assert_close(peft_logits(tiny, tmp_path / "out", ids), logits_of(trained, ids))


# PEFT's advice on a base of tied embeddings, for merging with PEFT.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("layout", ["peft", "peft-per-expert"])
def test_every_layout_is_one_that_we_read(base: Path, ids: Tensor, tmp_path: Path, layout: Any) -> None:
    trained = save_adapter(base, tmp_path / "adapter", train_embeddings=True, lora_dropout=0.05, **LORAS["ranks"])
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), format=layout)
    assert_close(peft_logits(base, tmp_path / "out", ids), logits_of(trained, ids))
    again = load_found(find_model(str(tmp_path / "out")), quantization="none", dtype="float32")
    assert_close(logits_of(again, ids), logits_of(trained, ids))


def test_a_runs_adapter_with_dropout_loads_in_stock_peft(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    """PEFT refuses dropout on fused experts, so what is saved says none."""
    trained = save_adapter(tiny, tmp_path, lora_dropout=0.05)
    assert_close(peft_logits(tiny, tmp_path, ids), logits_of(trained, ids))


def test_an_adapter_that_stock_peft_trained_on_fused_experts(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    """PEFT's own ``target_parameters``, gate and up with common factors, written by PEFT alone."""
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        rank_pattern={"mlp.experts.gate_up_proj": 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(stock, config)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = logits_of(theirs, ids)
    ours = load_found(find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
    assert_close(logits_of(ours, ids), expected)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), format="peft-per-expert")
    assert_close(peft_logits(tiny, tmp_path / "out", ids), expected)


def test_a_published_adapter_continues_training(tiny: Path, tmp_path: Path, ids: Tensor) -> None:
    sizes = {"kv": 16, "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48}
    stored = write_by_hand(tiny, tmp_path / "adapter", sizes | {"num_hidden_layers": 2, "num_local_experts": 4})
    lora = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["v_proj", "gate", "w1", "w2", "w3"])
    model: Any = load_mixtral(
        tiny,
        quantization="none",
        dtype="float32",
        lora=lora,
        train_embeddings=True,
        adapter=tmp_path / "adapter",
    )
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert again.keys() == stored.keys()
    for key, values in stored.items():
        scale = 7 / 3 if "lora_B" in key else 1  # its α/r, where ours is 1
        torch.testing.assert_close(again[key], values.float() * scale)


def test_what_is_in_the_folder(tiny: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path / "run/adapter", train_embeddings=True)
    shutil.copyfile(tiny / "tokenizer.json", tmp_path / "run/adapter/tokenizer.json")
    export(str(tmp_path / "run"), str(tmp_path / "out"), format="peft")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "base_identity.json", "tokenizer.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny.name
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert set(config["target_parameters"]) == {
        "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    }  # fmt: skip
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp"
    shapes = {name: tuple(tensors[f"{prefix}.{name}.weight"].shape) for name in (
        "experts.base_layer.lora_A", "experts.base_layer.lora_B", "experts.lora_A", "experts.lora_B", "gate.lora_A",
    )}  # fmt: skip
    assert shapes == {
        "experts.base_layer.lora_A": (4 * 8, 32),
        "experts.base_layer.lora_B": (96, 4 * 8),
        "experts.lora_A": (4 * 4, 48),
        "experts.lora_B": (32, 4 * 4),
        "gate.lora_A": (4, 32),
    }


def test_an_adapter_is_needed_and_one_only(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"writes one adapter, but .* gives 0"):
        export(str(tiny), str(tmp_path / "out"), format="peft")
    save_adapter(tiny, tmp_path / "adapter")
    with pytest.raises(ValueError, match="gives 2"):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"), format="peft", adapter=[str(tmp_path / "adapter")])


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"layers_to_transform": [1]},
        {"target_modules": ["q_proj", "w1"], "layers_to_transform": [0]},
        {"exclude_modules": ["model.layers.0.block_sparse_moe.gate", "model.layers.1.self_attn.q_proj"]},
        {"target_modules": r".*(layers\.1\..*\.w2|q_proj|layers\.0\..*gate)", "rank_pattern": {"w2": 2}},
    ],
    ids=str,
)
def test_peft_on_transformers_4_adapts_these_matrices_and_no_other(
    tiny: Path, tmp_path: Path, ids: Tensor, lora: dict[str, Any]
) -> None:
    trained = save_adapter(tiny, tmp_path / "adapter", **lora)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), format="peft-per-expert")
    stored = AdapterFile(tmp_path / "out", architecture_named("mixtral"))
    assert stored.config.layers_to_transform is None  # which PEFT 0.15 compares with the number of the expert
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "out"))
    config.task_type = None  # the stand-in cannot generate
    on_4: Any = peft.PeftModel(NamesOfTransformers4(tiny_mixtral_config()), config)
    report: Any = peft.set_peft_model_state_dict(on_4, load_file(tmp_path / "out/adapter_model.safetensors"))
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora_" in key]
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): module
        for name, module in on_4.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert sorted(layers) == stored.names
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), stored.delta(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT 0.21 on transformers 5 adapts all layers, and starts the others at zero
        assert_close(peft_logits(tiny, tmp_path / "out", ids), logits_of(trained, ids))


TARGETS_BY_LAYER = {
    "one each": ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"],
    "the other way": ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"],
    "both and one": ["mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj"],
    "down alone": ["experts.down_proj"],
    "gate and up alone": ["gate_up_proj"],
    "one layer, router": ["model.layers.1.mlp.experts.down_proj", "layers.0.mlp.gate.weight"],
}


@pytest.mark.parametrize("targets", TARGETS_BY_LAYER.values(), ids=TARGETS_BY_LAYER)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # of layers that are not adapted
def test_parameters_that_differ_by_layer(tiny: Path, ids: Tensor, tmp_path: Path, targets: list[str]) -> None:
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=targets, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(stock, config)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = logits_of(theirs, ids)
    ours = load_found(find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
    assert_close(logits_of(ours, ids), expected)
    for layout in ("peft", "peft-per-expert"):
        export(str(tmp_path / "adapter"), str(tmp_path / layout), format=layout)
        assert_close(peft_logits(tiny, tmp_path / layout, ids), expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["experts.gate_up_proj", "experts.down_proj"], "name both of gate_up_proj and down_proj"),
        (None, "name none of"),
        (["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj"], "elsewhere"),
    ],
)
def test_parameters_that_cannot_be_told_apart_are_refused(
    tiny: Path, tmp_path: Path, targets: list[str] | None, message: str
) -> None:
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(stock, config).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": targets}))
    with pytest.raises(ValueError, match=message):
        AdapterFile(tmp_path, architecture_named("mixtral"))


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
@pytest.mark.parametrize("tied_training", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning", "ignore:.*tied.*:UserWarning")
def test_embedding_and_head_of_a_tied_base(tmp_path: Path, ids: Tensor, saved: list[str], tied_training: bool) -> None:
    """As stock PEFT trains them: apart, unless it is told to keep them tied."""
    base = save_tiny_mixtral(tmp_path / "base", tie_word_embeddings=True)
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, target_modules=["o_proj"], modules_to_save=saved, ensure_weight_tying=tied_training, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(stock, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    again = partial(load_found, find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
    if tied_training:
        assert_close(logits_of(again(), ids), logits_of(theirs, ids))
        export(str(tmp_path / "adapter"), str(tmp_path / "out"))
        assert_close(stock_logits(tmp_path / "out", ids), logits_of(theirs, ids))
        return
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"])
    message = "but the base ties embed_tokens and lm_head"
    with pytest.raises(ValueError, match=message):
        again()
    with pytest.raises(ValueError, match=message):
        load_mixtral(base, lora=lora, train_embeddings=True, adapter=tmp_path / "adapter")
    for layout in ("hf", "peft", "peft-per-expert"):
        with pytest.raises(ValueError, match=message):
            export(str(tmp_path / "adapter"), str(tmp_path / "out"), format=layout)
