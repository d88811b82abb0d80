"""Targets, exclusions, layers and patterns in every naming, applied as stock PEFT applies them to transformers 4."""

import re
import time
from typing import Any

import peft
import pytest
import torch

from lightning_mixcn.model import build_mixtral
from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.model.checkpoints.layout import disk_names
from lightning_mixcn.model.lora.attach import lora_layers
from lightning_mixcn.testing import tiny_mixtral_config
from tests.model.checkpoints.transformers4 import NamesOfTransformers4


def stock_choice(**lora: Any) -> dict[str, tuple[int, float]]:
    """Name of every matrix that stock PEFT adapts → rank and alpha."""
    with torch.device("meta"):
        stock: Any = peft.LoraModel(NamesOfTransformers4(tiny_mixtral_config()), peft.LoraConfig(**lora), "default")
    return {
        name.removeprefix("model.model."): (module.r["default"], module.lora_alpha["default"])
        for name, module in stock.named_modules(prefix="model")
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def our_choice(**lora: Any) -> dict[str, tuple[int, float]]:
    model = build_mixtral(tiny_mixtral_config(), lora=peft.LoraConfig(**lora), device="meta")
    return {
        name: (layer.r["default"], layer.lora_alpha["default"])
        for module, layer in lora_layers(model)
        for name in disk_names(architecture_named("mixtral"), module, layer.groups)
    }


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"], "exclude_modules": ["gate"]},
        {"target_modules": "all-linear", "exclude_modules": ["gate", "w2"]},
        {"target_modules": "all-linear", "exclude_modules": r".*block_sparse_moe\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["model.layers.0.block_sparse_moe.gate"]},
        {"target_modules": ["q_proj", "w1"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "w1"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "block_sparse_moe.gate"], "layers_to_transform": [1]},
        {"target_modules": r".*\.(q_proj|w[13])"},
        {"target_modules": r"model\.layers\.1\..*\.([a-z]_proj|gate|w\d)"},
        {"target_modules": r".*experts\.\d+\.w2"},
        {"target_modules": "all-linear", "rank_pattern": {"block_sparse_moe.gate": 2}},
        {"target_modules": "all-linear", "rank_pattern": {r"experts\.\d+\.w1": 2, "w[13]": 3}},
        {"target_modules": "all-linear", "rank_pattern": {r"layers\.0\.block_sparse_moe\..*": 2}},
        {"target_modules": "all-linear", "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2, ".*w2": 7}},
        {"target_modules": ["w1", "w2"], "alpha_pattern": {"w1": 5, r"layers\.1\..*w2": 3}, "use_rslora": True},
        {"target_modules": [f"model.layers.1.block_sparse_moe.experts.{expert}.w1" for expert in range(4)]},
    ],
    ids=str,
)  # fmt: skip
def test_the_names_of_adapter_files_mean_what_they_mean_to_stock_peft(lora: dict[str, Any]) -> None:
    lora = {"r": 4, "lora_alpha": 8} | lora
    expected = stock_choice(**lora)
    assert expected
    assert our_choice(**lora) == expected


@pytest.mark.parametrize(
    ("ours", "files"),
    [
        ({"target_modules": ["gate_proj", "up_proj"]}, {"target_modules": ["w1", "w3"]}),
        ({"target_modules": ["mlp.gate", "down_proj"]}, {"target_modules": ["gate", "w2"]}),
        ({"target_modules": ["model.layers.1.mlp.experts.gate_proj", "model.layers.0.mlp.gate.linear"]},
         {"target_modules": r".*(layers\.1\..*\.w1|layers\.0\..*\.gate)"}),
        ({"target_modules": r".*mlp\.experts\..*"}, {"target_modules": ["w1", "w2", "w3"]}),
        ({"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
         {"target_modules": "all-linear", "exclude_modules": ["gate"]}),
        ({"target_modules": "all-linear", "exclude_modules": ["up_proj", "lm_head"]},
         {"target_modules": "all-linear", "exclude_modules": ["w3"]}),
        ({"target_modules": "all-linear", "exclude_modules": "lm_head"}, {"target_modules": "all-linear"}),
        ({"target_modules": "all-linear", "rank_pattern": {"gate_proj": 2, "mlp.gate": 3}},
         {"target_modules": "all-linear", "rank_pattern": {"w1": 2, "gate": 3}}),
        ({"target_modules": "all-linear", "alpha_pattern": {r"layers\.0\.mlp\..*": 3}},
         {"target_modules": "all-linear", "alpha_pattern": {r"layers\.0\.block_sparse_moe\..*": 3}}),
        ({"target_modules": ["base_model.model.model.layers.0.self_attn.q_proj"],
          "rank_pattern": {r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj": 2}},
         {"target_modules": ["model.layers.0.self_attn.q_proj"], "rank_pattern": {"q_proj": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_our_names_mean_the_same_matrices(ours: dict[str, Any], files: dict[str, Any]) -> None:
    assert our_choice(r=4, **ours) == stock_choice(r=4, **files)


ALL = "all-linear"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"modules` names 'q_porj', which matches nothing .* Did you mean q_proj"),
        ({"target_modules": ["block_sparse_moe.gat"]}, r"Did you mean block_sparse_moe\.gate"),
        ({"target_modules": ["lm_head"]}, r"`train_embeddings: true` trains embed_tokens"),
        ({"target_modules": "w1"}, r"target_modules` names 'w1', which matches nothing"),
        ({"target_modules": "(w1"}, "is not a regular expression"),
        ({"target_modules": None}, "expected a list"),
        ({"target_modules": ALL, "exclude_modules": ["q_porj"]}, r"exclude_modules` names 'q_porj'"),
        ({"target_modules": ALL, "exclude_modules": ".*q_porj"}, r"exclude_modules` names '\.\*q_porj'"),
        ({"target_modules": ["w1"], "exclude_modules": ["w1"]}, "leaves nothing"),
        ({"target_modules": ALL, "rank_pattern": {"q_porj": 2}}, r"rank_pattern` names 'q_porj'.*mean q_proj"),
        ({"target_modules": ALL, "alpha_pattern": {"w4": 2}}, r"alpha_pattern` names 'w4'"),
        ({"target_modules": ["w1"], "rank_pattern": {"w2": 2}}, r"pattern\['w2'\]` has no effect: .* not adapt it"),
        ({"target_modules": ALL, "rank_pattern": {"w1": 2, r"layers\.0\..*w1": 3}}, "keys before it match all"),
        ({"target_modules": ALL, "rank_pattern": {"w1": 0}}, r"rank_pattern\['w1'\]=0`: expected at least 1"),
        ({"target_modules": ALL, "alpha_pattern": {"w1": 0}}, r"alpha_pattern\['w1'\]=0`: expected more than 0"),
        ({"target_modules": ALL, "lora_alpha": 0}, r"lora_alpha=0`: expected more than 0"),
        ({"target_modules": ALL, "rank_pattern": {"model.layers.0.block_sparse_moe.experts.0.w1": 2}},
         r"rank_pattern` gives w1 of layer 0 2 and 4 by expert"),
        ({"target_modules": [r"model.layers.0.block_sparse_moe.experts.0.w1"]}, "adapted together"),
        ({"target_modules": ["experts.2.w3"]}, "adapted together"),
        ({"target_modules": ALL, "exclude_modules": ["experts.2.w3"]}, "adapted together"),
        ({"target_modules": ["w1"], "layers_to_transform": [0], "layers_pattern": "experts"}, "adapted together"),
        ({"target_modules": ["w1"], "layers_to_transform": [1, 9]}, r"transform=\[1, 9\]` matches nothing for 9"),
        ({"target_modules": ["w1"], "layers_to_transform": [0], "layers_pattern": "blocks"}, "pattern='blocks'`"),
        ({"target_modules": ["w1"], "layers_to_transform": []}, "matches nothing"),
        ({"target_modules": ".*_proj"}, r"'\.\*_proj' matches k_proj, o_proj, .* and also gate_proj"),
        ({"target_modules": ".*gate.*"}, "Spell out the names"),
        ({"target_modules": ALL, "rank_pattern": {"gate_up_proj": 2}}, r"'gate_up_proj'.* Did you mean gate_proj"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_or_another_is_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        our_choice(**({"r": 4} | lora))
    assert "\n" not in str(raised.value)


def test_every_name_of_a_large_model_is_found_in_seconds() -> None:
    config = tiny_mixtral_config(num_hidden_layers=32, num_local_experts=8)
    start = time.perf_counter()
    build_mixtral(config, device="meta")
    bare = time.perf_counter() - start
    names = [f"model.layers.{n}.block_sparse_moe.experts.{e}.w1" for n in range(32) for e in range(8)]
    ranks = {re.escape(name): 2 + int(name.split(".")[2]) % 2 for name in names}
    start = time.perf_counter()
    model = build_mixtral(config, device="meta", lora=peft.LoraConfig(r=4, target_modules=names, rank_pattern=ranks))
    assert {layer.r["default"] for _, layer in lora_layers(model)} == {2, 3}
    assert time.perf_counter() - start - bare < 20
