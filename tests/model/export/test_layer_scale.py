"""Adapters scaled by layer at export: the formula in float64, reverted layers bit for bit, formats, refusals."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_mixcn.cli import main
from lightning_mixcn.model import find_model, load_found
from lightning_mixcn.model.architectures import MODEL_TYPES
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.export.gguf import CONVERTER
from lightning_mixcn.testing import save_tiny_mixtral, save_tiny_model
from tests.model.export.test_folder import logits_of
from tests.model.export.test_instruct_delta import (
    EMBEDDINGS,
    Weights,
    adapted,
    assert_equal,
    pair,
    refused,
    save_lora,
    stock_weights,
)

LAYERS = 3
SCALE = {0: 0.0, 1: 0.3}  # layer 2 is not named


def written(folder: Path, scale: Mapping[int, float] = SCALE) -> str:
    file = folder / "scale.json"
    file.write_text(json.dumps(scale))
    return str(file)


def scaled(base: Path, adapter: Path, scale: Mapping[int, float] = SCALE) -> Weights:
    """Return W + f·2·BA with each layer's f, in float64."""
    start = stock_weights(base)
    result = adapted(start, adapter)
    for name in result:
        parts = name.split(".")
        if parts[1] == "layers":
            result[name] = start[name] + scale.get(int(parts[2]), 1.0) * (result[name] - start[name])
    return result


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_merged_model_is_the_formula(family: str, layout: Any, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", family, num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter", train_embeddings=True)
    export(str(adapter), str(tmp_path / "out"), layout=layout, layer_scale=written(tmp_path))
    wanted = scaled(base, adapter)
    assert_equal(tmp_path / "out", wanted)
    start, found = stock_weights(base), stock_weights(tmp_path / "out")
    for name in found:
        if name.startswith("model.layers.0."):
            assert torch.equal(found[name], start[name]), name
    assert all(not torch.equal(found[name], start[name]) for name in EMBEDDINGS)  # trained ones are no layer's


def test_a_reverted_layer_is_the_bases_to_the_last_bit(tmp_path: Path) -> None:
    """In the file's own type, and with zeros that have a sign."""
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    stored = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name][0] = -0.0
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_lora(base, tmp_path / "adapter")
    export(str(adapter), str(tmp_path / "out"), layer_scale=written(tmp_path))
    export(str(base), str(tmp_path / "same"))
    found, same = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "same"))
    assert torch.equal(found[name].view(torch.int32), stored[name].view(torch.int32))
    kept = [key for key in same if key.startswith("model.layers.0.")]
    assert len(kept) > 10
    assert all(torch.equal(found[key].view(torch.int32), same[key].view(torch.int32)) for key in kept)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_together_with_an_instruct_delta(family: str, tmp_path: Path) -> None:
    base, instruct = pair(tmp_path, family, num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter")
    scale = written(tmp_path)
    export(str(adapter), str(tmp_path / "out"), instruct_delta=str(instruct), instruct_weight=0.5, layer_scale=scale)
    start, tuned = stock_weights(base), stock_weights(instruct)
    wanted = scaled(base, adapter)
    assert_equal(tmp_path / "out", {name: wanted[name] + 0.5 * (tuned[name] - start[name]) for name in wanted})


# Of layers that are not adapted: PEFT adapts experts of all layers, and starts the others at zero.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("layout", ["peft", "peft-per-expert"])
def test_an_adapter_in_stock_peft_is_the_merged_model(layout: Any, tmp_path: Path) -> None:
    """float32, A and B multiplied in another order than in the merged weights."""
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter")
    scale, out = written(tmp_path), tmp_path / "out"
    export(str(adapter), str(out), format=layout, layer_scale=scale)
    export(str(adapter), str(tmp_path / "merged"), layer_scale=scale)
    ids = torch.arange(24)[None] + 5
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(stock, str(out))
    wanted = logits_of(merged, ids)
    torch.testing.assert_close(logits_of(theirs, ids), wanted, rtol=1e-4, atol=1e-4)
    ours = load_found(find_model(str(out)), quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(ours, ids), wanted, rtol=1e-4, atol=1e-4)
    assert not any(".layers.0." in key for key in load_file(out / "adapter_model.safetensors"))


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("layout", ["peft", "peft-per-expert"])
def test_an_exported_adapter_of_every_family_merges_alike(family: str, layout: Any, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", family, num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter", train_embeddings=True)
    export(str(adapter), str(tmp_path / "scaled"), format=layout, layer_scale=written(tmp_path))
    export(str(tmp_path / "scaled"), str(tmp_path / "out"))
    assert_equal(tmp_path / "out", scaled(base, adapter))


def test_onto_four_bits(tmp_path: Path) -> None:
    """Onto dequantised weights, whose reverted layer is the bare base's in 4 bits."""
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter")
    export(str(base), str(tmp_path / "bare"), base="dequantised")
    export(str(adapter), str(tmp_path / "out"), base="dequantised", layer_scale=written(tmp_path))
    assert_equal(tmp_path / "out", scaled(tmp_path / "bare", adapter))


def test_further_adapters_are_scaled_as_well(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter")
    export(str(adapter), str(tmp_path / "out"), adapter=[str(adapter)], layer_scale=written(tmp_path))
    once, start = scaled(base, adapter), stock_weights(base)
    assert_equal(tmp_path / "out", {name: 2 * once[name] - start[name] for name in once})


def test_gguf_is_made_of_the_scaled_model(tmp_path: Path) -> None:
    """A converter that hands on what it was given."""
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter")
    (tmp_path / CONVERTER).write_text(
        "import shutil, sys\nshutil.copyfile(sys.argv[1] + '/model.safetensors', sys.argv[3])\n"
    )
    arguments: dict[str, Any] = {"layer_scale": written(tmp_path), "llama_cpp": str(tmp_path)}
    export(str(adapter), str(tmp_path / "m.gguf"), format="gguf", **arguments)
    export(str(adapter), str(tmp_path / "out"), layer_scale=arguments["layer_scale"])
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_the_card_says_it(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "run/adapter")
    report = {"steps_trained": 3, "sources": {"zh": {"nll_nats_per_token": 1.0, "bits_per_byte": 0.5, "tokens": 9}}}
    (tmp_path / "run/validate.json").write_text(json.dumps(report))
    for format in ("hf", "peft"):
        out = tmp_path / format
        export(str(tmp_path / "run"), str(out), format=format, layer_scale=written(tmp_path))
        card = (out / "README.md").read_text()
        assert "multiplied by layer: 0 in layer 0, 0.3 in layer 1 (arXiv 2606.00284)" in card
        assert "before export; layers were scaled after that:" in card
    export(str(adapter), str(tmp_path / "plain"))
    export(str(adapter), str(tmp_path / "ones"), layer_scale=written(tmp_path, {0: 1.0}))
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "ones" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"3": 0.5}', "a key of it is '3', expected the number of a layer, 0 to 2"),
        ('{"-1": 0.5}', "expected the number of a layer, 0 to 2"),
        ('{"01": 0.5}', "expected the number of a layer, 0 to 2"),
        ('{"first": 0.5}', "expected the number of a layer, 0 to 2"),
        ('{"0-3": 0.5}', "expected the number of a layer, 0 to 2, or a range such as 0-2"),
        ('{"2-1": 0.5}', "or a range such as 0-2"),
        ('{"1-": 0.5}', "or a range such as 0-2"),
        ('{"0-1": 0, "1": 1}', "names layer 1 twice. Give one factor a layer"),
        ('{"0": -0.5}', "['0'] is -0.5, expected a finite number of 0 to 100"),
        ('{"0": "half"}', "['0'] is 'half', expected a finite number of 0 to 100"),
        ('{"0": true}', "['0'] is true, expected a finite number of 0 to 100"),
        ('{"0": NaN}', "it holds NaN, which is no number of JSON"),
        ('{"0": 0, "0": 1}', "the key '0' is there twice"),
        ("[0, 1]", "holds a JSON list, expected an object"),
        (None, "is not there. Give one factor a layer"),
    ],
)
@pytest.mark.parametrize("format", ["hf", "peft"])
def test_another_file_is_refused_in_one_line(
    content: str | None, message: str, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS), tmp_path / "adapter")
    file = tmp_path / "scale.json"
    if content is not None:
        file.write_text(content)
    refused(tmp_path, [f"--layer_scale={file}", f"--format={format}"], message, capsys)


def test_a_model_without_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_mixtral(tmp_path / "adapter")
    message = "scales adapters, of which SRC has none. Give a run or an adapter, or leave it out"
    refused(tmp_path, [f"--layer_scale={written(tmp_path, {0: 0.5})}"], message, capsys)


def test_an_adapter_of_which_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    save_lora(base, tmp_path / "adapter")
    file = written(tmp_path, dict.fromkeys(range(LAYERS), 0))
    message = "holds no LoRA factors but those that `layer_scale` reverts. Merge it with `--format hf`"
    refused(tmp_path, [f"--layer_scale={file}", "--format=peft"], message, capsys)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), layer_scale=file)
    assert_equal(tmp_path / "out", stock_weights(base))


def test_uniform_factors_are_the_adapter_times_that(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS)
    adapter = save_lora(base, tmp_path / "adapter")
    file = written(tmp_path, dict.fromkeys(range(LAYERS), 0.5))
    export(str(adapter), str(tmp_path / "half"), format="peft-per-expert", layer_scale=file)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "half"))
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "half")]
    rates = [config["lora_alpha"] / config["r"] for config in configs]
    assert math.isclose(rates[1], rates[0] / 2)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("given", "factors"),
    [('{"0-1": 0.5}', {0: 0.5, 1: 0.5}), ('{"0-0": 0, "2": 0.3}', {0: 0.0, 2: 0.3}), ("{}", {})],
)
def test_ranges_of_layers_in_place_of_a_file(given: str, factors: dict[int, float], tmp_path: Path) -> None:
    adapter = save_lora(save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS), tmp_path / "adapter")
    for name, scale in (("ranges", given), ("file", written(tmp_path, factors))):
        assert main(["export", str(adapter), str(tmp_path / name), "--layer_scale", scale]) == 0
    assert_equal(tmp_path / "ranges", stock_weights(tmp_path / "file"))


def test_a_mistake_in_place_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(save_tiny_mixtral(tmp_path / "base", num_hidden_layers=LAYERS), tmp_path / "adapter")
    refused(tmp_path, ['--layer_scale={"0": 0', "--format=peft"], "`layer_scale`", capsys)
    refused(tmp_path, ['--layer_scale={"7": 0}'], "expected the number of a layer, 0 to 2", capsys)
