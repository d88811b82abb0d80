"""Merged checkpoints: stock transformers computes with them what the trained model computes, and what numpy says."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_mixcn.model import MoePeftModel, find_model, load_found
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral
from tests.model.adapters_on_disk import save_adapter, write_by_hand

# float32; the merged product rounds where the split one does not.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
LORAS: dict[str, dict[str, Any]] = {
    "all": {},
    "ranks": {"rank_pattern": {"w1": 2, "w2": 6, "q_proj": 3}, "alpha_pattern": {"w3": 5, "gate": 2}},
    "rslora": {"use_rslora": True, "r": 8},
    "no w2": {"target_modules": ["w1", "w3", "gate"]},
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "second layer": {"target_modules": ["q_proj", "w1", "w2", "w3"], "layers_to_transform": [1]},
    "embeddings": {"train_embeddings": True},
}


def stock_logits(folder: Path, ids: Tensor) -> Tensor:
    """``[2, 40, vocab]`` of the folder in stock transformers, whose report must name no missing or unused weight."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # dtype: config's
    model, report = loaded
    assert not any(report.values()), report
    assert type(model).__name__ == model.config.architectures[0]
    return logits_of(model.float(), ids)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_transformers_gives_the_trained_models_logits(
    tiny: Path, ids: Tensor, tmp_path: Path, lora: dict[str, Any]
) -> None:
    trained = save_adapter(tiny, tmp_path / "adapter", **lora)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    expected = logits_of(trained, ids)
    assert_close(stock_logits(tmp_path / "out", ids), expected)
    assert (expected - stock_logits(tiny, ids)).abs().max() > 0.1  # the adapter says something


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_both_namings_are_the_same_model(base: Path, ids: Tensor, tmp_path: Path, layout: Any) -> None:
    trained = save_adapter(base, tmp_path / "adapter", train_embeddings=True, **LORAS["ranks"])
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), layout=layout)
    assert_close(stock_logits(tmp_path / "out", ids), logits_of(trained, ids))


def test_tied_embeddings_stay_tied(tmp_path: Path, ids: Tensor) -> None:
    base = save_tiny_mixtral(tmp_path / "base", tie_word_embeddings=True)
    trained = save_adapter(base, tmp_path / "adapter", train_embeddings=True)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out")
    assert_close(stock_logits(tmp_path / "out", ids), logits_of(trained, ids))


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_either_naming_of_the_base(tiny: Path, tmp_path: Path, ids: Tensor, layout: Any) -> None:
    """A base without an adapter is renamed, nothing else; and back again."""
    export(str(tiny), str(tmp_path / "one"), layout="fused")
    export(str(tmp_path / "one"), str(tmp_path / "two"), layout=layout)
    assert torch.equal(stock_logits(tmp_path / "two", ids), stock_logits(tiny, ids))
    names = Checkpoint(tmp_path / "two").names()
    assert any("experts.gate_up_proj" in name for name in names) == (layout == "fused")
    if layout == "per-expert":
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "two", tiny))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_by_hand_gives_what_numpy_says(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    """W + (α/r)·B·A in float64, on the safetensors alone, and through our own loading of the same adapter."""
    config = transformers.MixtralConfig.from_pretrained(tiny)
    sizes = {"kv": 16} | {
        key: getattr(config, key)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts")
    }
    stored = write_by_hand(tiny, tmp_path / "adapter", sizes)
    weights = {name: values.double().numpy() for name, values in load_file(tiny / "model.safetensors").items()}
    arrays = {key.removeprefix("base_model.model."): values.double().numpy() for key, values in stored.items()}
    for key in arrays:
        if key.endswith("lora_B.weight"):
            name = key.removesuffix(".lora_B.weight")
            weights[f"{name}.weight"] = (
                weights[f"{name}.weight"] + 7 / 3 * arrays[key] @ arrays[f"{name}.lora_A.weight"]
            )
        elif "lora" not in key:
            weights[key] = arrays[key]
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    with safe_open(tmp_path / "out/model.safetensors", framework="np") as file:
        assert set(file.keys()) == weights.keys()
        for name, expected in weights.items():
            np.testing.assert_allclose(file.get_tensor(name), expected, rtol=1e-6, atol=1e-6)
    loaded = load_found(find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
    assert_close(logits_of(loaded, ids), stock_logits(tmp_path / "out", ids))


def test_bfloat16_is_rounded_once(tiny: Path, tmp_path: Path) -> None:
    trained = save_adapter(tiny, tmp_path / "adapter")
    export(str(tmp_path / "adapter"), str(tmp_path / "exact"))
    export(str(tmp_path / "adapter"), str(tmp_path / "half"), dtype="bfloat16")
    exact, half = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "half"))
    assert all(torch.equal(half[name], values.bfloat16()) for name, values in exact.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert trained.dtype == torch.float32


def test_dtype_is_kept(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    export(str(base), str(tmp_path / "half"), dtype="bfloat16")
    export(str(tmp_path / "half"), str(tmp_path / "out"))
    checkpoint = Checkpoint(tmp_path / "out")
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {torch.bfloat16}
    assert checkpoint.config["dtype"] == checkpoint.config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["quantised on loading", "4-bit folder"])
def test_dequantised_is_the_model_that_was_trained(base: Path, ids: Tensor, tmp_path: Path, kind: str) -> None:
    source = base
    if kind == "4-bit folder":
        quantize(str(base), str(tmp_path / "small"), dtype="float32")
        source = tmp_path / "small"
    trained = save_adapter(source, tmp_path / "adapter", quantization="nf4")
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), base="dequantised")
    assert_close(stock_logits(tmp_path / "out", ids), logits_of(trained, ids))
    assert "quantization_config" not in Checkpoint(tmp_path / "out").config


@pytest.mark.parametrize("kind", ["quantised on loading", "4-bit folder"])
def test_dequantised_of_a_16_bit_base_is_exact_too(base: Path, ids: Tensor, tmp_path: Path, kind: str) -> None:
    """Rounded to the base's bfloat16 after merging, logits were off by up to 0.85, and by 0.26 on a trained adapter."""
    export(str(base), str(tmp_path / "half"), dtype="bfloat16")
    source = tmp_path / "half"
    if kind == "4-bit folder":
        quantize(str(source), str(tmp_path / "small"))
        source = tmp_path / "small"
    trained = save_adapter(source, tmp_path / "adapter", quantization="nf4", scale=0.03)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), base="dequantised")
    assert_close(stock_logits(tmp_path / "out", ids), logits_of(trained, ids))
    assert Checkpoint(tmp_path / "out").config["dtype"] == "float32"
    export(str(tmp_path / "adapter"), str(tmp_path / "rounded"), base="dequantised", dtype="bfloat16")
    assert Checkpoint(tmp_path / "rounded").config["dtype"] == "bfloat16"
    assert (stock_logits(tmp_path / "rounded", ids) - logits_of(trained, ids)).abs().max() > 0.01


def test_the_original_differs_by_what_quantisation_does(base: Path, ids: Tensor, tmp_path: Path) -> None:
    """Every weight by its own rounding to 4 bits, and nothing else.

    Of logits that was 0.95 (random weights) and 1.39 (trained ones) of what quantising the bare base does.
    """
    quantize(str(base), str(tmp_path / "small"), dtype="float32")
    trained = save_adapter(tmp_path / "small", tmp_path / "adapter", quantization="nf4", scale=0.03)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    export(str(tmp_path / "adapter"), str(tmp_path / "rounded"), base="dequantised")
    export(str(tmp_path / "small"), str(tmp_path / "plain"), base="dequantised")
    stored = [load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "rounded")]
    bases = [load_file(folder / "model.safetensors") for folder in (base, tmp_path / "plain")]
    for name in stored[0]:
        expected = bases[0][name] - bases[1][name]
        torch.testing.assert_close(stored[0][name] - stored[1][name], expected, rtol=0, atol=1e-6)
    difference = stock_logits(tmp_path / "out", ids) - logits_of(trained, ids)
    quantisation = stock_logits(base, ids) - stock_logits(tmp_path / "plain", ids)
    assert difference.norm() < 2 * quantisation.norm()


def test_stacked_adapters_are_merged_in_order(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    """The second was trained on the merged first; stacking both gives what merging twice gives."""
    save_adapter(tiny, tmp_path / "one", train_embeddings=True)
    export(str(tmp_path / "one"), str(tmp_path / "merged"))
    second = save_adapter(tmp_path / "merged", tmp_path / "two", r=2)
    export(str(tmp_path / "one"), str(tmp_path / "out"), adapter=[str(tmp_path / "two")])
    assert_close(stock_logits(tmp_path / "out", ids), logits_of(second, ids))
    assert isinstance(second, MoePeftModel)


def test_shards_hold_no_more_than_asked(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    trained = save_adapter(tiny, tmp_path / "adapter")
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), max_shard_bytes=50_000)
    sizes = [sum(v.nbytes for v in load_file(path).values()) for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) <= 50_000
    assert_close(stock_logits(tmp_path / "out", ids), logits_of(trained, ids))


def test_generation_by_stock_transformers(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > ids.shape[1]
