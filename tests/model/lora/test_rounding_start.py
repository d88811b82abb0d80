"""LoRA that starts from what NF4 rounds off: its error against float64, and what is written, served and resumed."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_mixcn.files.safetensors import write_safetensors
from lightning_mixcn.model import MoePeftModel, find_model, load_found, load_moe, shard_model
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.checkpoints.layout import disk_names
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.lora.adapter_file import AdapterFile
from lightning_mixcn.model.lora.attach import lora_layers, stored_adapter
from lightning_mixcn.model.lora.choice import TrainOnly
from lightning_mixcn.model.lora.rounding_start import best_factors
from lightning_mixcn.model.nf4.storage import NF4Weight
from lightning_mixcn.testing import run_distributed, save_tiny_model
from tests.model.adapters_on_disk import TARGETS
from tests.model.trained_values import draw_trained

SOME: Any = {"experts": {"0": [1, 2], "1": [3]}}
FAMILIES = ("mixtral", "olmoe", "qwen3_moe")


def started(base: Path, *, rank: int = 8, train_only: TrainOnly | None = None, **options: Any) -> MoePeftModel:
    lora = peft.LoraConfig(r=rank, lora_alpha=12, target_modules=TARGETS, **options)
    model = load_moe(base, dtype="float32", lora=lora, lora_start="rounding_error", train_only=train_only)
    assert isinstance(model, MoePeftModel)
    return model


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits


IDS = torch.arange(3, 83).view(2, 40)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_error_is_the_tail_of_the_singular_values(tmp_path: Path, family: str, use_rslora: bool) -> None:
    """Of every expert and projection, in float64, against numpy's singular values of W − NF4(W).

    At rank 16 the search spans a matrix of 32 columns, so that its factors are the best ones.
    """
    base = save_tiny_model(tmp_path / "base", family)
    stored = load_file(base / "model.safetensors")
    model = started(base, rank=16, use_rslora=use_rslora)
    checked = 0
    for name, layer in lora_layers(model):
        if not isinstance(layer.storage, NF4Weight):
            assert not layer.get_delta_weight("default").any()  # the router's, which is not rounded
            continue
        rounded = layer.storage.flat(torch.float32).view(layer.storage.shape).double()
        delta = layer.get_delta_weight("default").detach().double()
        architecture = base_of(model).architecture
        for group, disk in enumerate(disk_names(architecture, name, layer.groups)):
            error = stored[f"{disk}.weight"].double() - rounded[group]
            values = torch.linalg.svdvals(error)
            left = torch.linalg.matrix_norm(error - delta[group])
            torch.testing.assert_close(left, values[16:].norm(), rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked == 2 * (4 + 3 * model.config.num_local_experts)


def test_search_finds_next_to_the_best_of_a_large_matrix() -> None:
    """Errors of rounding have slowly falling singular values, which is where a search is worst."""
    error = torch.rand(300, 200, generator=torch.Generator().manual_seed(1)) - 0.5
    a, b = best_factors(error, 8)
    left = torch.linalg.matrix_norm(error.double() - b.double() @ a.double())
    values = torch.linalg.svdvals(error.double())
    assert values[8:].norm() <= left < 1.001 * values[8:].norm()
    assert float((b @ a).norm() ** 2) > 0.97 * float(values[:8].norm() ** 2)


def test_logits_right_after_loading_are_those_of_dense_weights(tmp_path: Path) -> None:
    """Stock transformers in float32 with NF4(W) + s·B A in place of W; and nearer to W than NF4(W) is."""
    base = save_tiny_model(tmp_path / "base", "mixtral")
    model = started(base, rank=16)
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    original = logits_of(dense, IDS)
    rounded = logits_of(load_moe(base, dtype="float32"), IDS)
    export(_saved(model, tmp_path / "adapter"), str(tmp_path / "out"), base="dequantised")
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged, IDS), logits_of(model, IDS), rtol=1e-4, atol=1e-4)
    assert (logits_of(model, IDS) - original).norm() < 0.8 * (rounded - original).norm()


def _saved(model: MoePeftModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


# PEFT's own conversion of w1 and w3 to the fused layout leaves patterns for what was not adapted.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_served_is_what_was_trained(tmp_path: Path, family: str) -> None:
    """On the rounded base the factors as they trained; on the high-precision base their change alone."""
    base = save_tiny_model(tmp_path / "base", family)
    model = started(base, rank_pattern={"w1": 4})
    before = {name: layer.get_delta_weight("default").detach().clone() for name, layer in lora_layers(model)}
    draw_trained(model, 0.05)
    folder = _saved(model, tmp_path / "adapter")
    expected = logits_of(model, IDS)
    found = find_model(folder)
    torch.testing.assert_close(logits_of(load_found(found, dtype="float32"), IDS), expected, rtol=1e-4, atol=1e-4)
    export(folder, str(tmp_path / "rounded"), base="dequantised")
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged, IDS), expected, rtol=1e-4, atol=1e-4)
    export(folder, str(tmp_path / "out"), dtype="float32")
    stored, out = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    architecture = base_of(model).architecture
    for name, layer in lora_layers(model):
        change = (layer.get_delta_weight("default") - before[name]).detach()
        for group, disk in enumerate(disk_names(architecture, name, layer.groups)):
            difference = out[f"{disk}.weight"].float() - stored[f"{disk}.weight"].float()
            torch.testing.assert_close(difference, change[group], rtol=1e-4, atol=1e-5)
    # Stock PEFT, and our own loading without 4 bits, of the adapter itself: the same.
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = load_found(found, quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(dense, IDS), logits_of(merged, IDS), rtol=1e-4, atol=1e-4)
    for layout in ("peft", "peft-per-expert"):
        export(folder, str(tmp_path / layout), format=layout)
        again = load_found(find_model(str(tmp_path / layout)), dtype="float32")
        torch.testing.assert_close(logits_of(again, IDS), expected, rtol=1e-4, atol=1e-4)
        stock: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        served = peft.PeftModel.from_pretrained(stock, str(tmp_path / layout))
        torch.testing.assert_close(logits_of(served, IDS), logits_of(merged, IDS), rtol=1e-4, atol=1e-4)


def test_training_on_from_an_adapter_keeps_its_start(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    model = started(base)
    untrained = AdapterFile(_saved(model, tmp_path / "untrained"), base_of(model).architecture)
    assert all(untrained.delta(name).abs().max() < 1e-6 for name in untrained.names)
    draw_trained(model, 0.05)
    first = _saved(model, tmp_path / "first")
    # With another scaling, which B takes.
    lora = peft.LoraConfig(r=8, lora_alpha=3, target_modules=TARGETS)
    again = load_moe(base, dtype="float32", lora=lora, adapter=first)
    assert isinstance(again, MoePeftModel)
    second = _saved(again, tmp_path / "second")
    ours, theirs = (AdapterFile(path, untrained.architecture) for path in (first, second))
    assert ours.start_rank == theirs.start_rank == 8
    for name in ours.names:
        torch.testing.assert_close(theirs.delta(name), ours.delta(name), rtol=1e-4, atol=1e-6)


def test_only_chosen_experts_have_a_start(tmp_path: Path) -> None:
    """It is the one that they have when all are chosen; on disk, the others are zeros."""
    base = save_tiny_model(tmp_path / "base", "mixtral")
    whole, _ = stored_adapter(started(base))
    model = started(base, train_only=SOME)
    some, _ = stored_adapter(model)
    numbers = [(layer, expert) for layer, experts in SOME["experts"].items() for expert in experts]
    assert {name for name in some if ".experts." in name} == {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
        for layer, expert in numbers
        for leaf in ("w1", "w2", "w3")
    }
    for name, stored in some.items():
        assert torch.equal(stored.a[8:], whole[name].a[8:]), name
        assert torch.equal(stored.b[:, 8:], whole[name].b[:, 8:]), name
    draw_trained(model, 0.05)
    lora = peft.LoraConfig(r=8, lora_alpha=12, target_modules=TARGETS)
    adapter = _saved(model, tmp_path / "adapter")
    for choice in (SOME, None):
        again = load_moe(base, dtype="float32", lora=lora, adapter=adapter, train_only=choice)
        torch.testing.assert_close(logits_of(again, IDS), logits_of(model, IDS))


def sharded(base: str, choice: TrainOnly | None) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("shard",))
    lora = peft.LoraConfig(r=8, lora_alpha=12, target_modules=TARGETS)
    model = load_moe(
        base, dtype="float32", lora=lora, lora_start="rounding_error", train_only=choice,
        shard=lambda whole: shard_model(whole, mesh),
    )  # fmt: skip
    assert isinstance(model, MoePeftModel)
    factors, _ = stored_adapter(model)
    return {name: (stored.a, stored.b) for name, stored in factors.items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "choice"), [(2, None), (3, None), (2, SOME)])
def test_shares_are_those_of_the_whole(tmp_path: Path, ranks: int, choice: TrainOnly | None) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    whole, _ = stored_adapter(started(base, train_only=choice))
    assert any(stored.b.any() for stored in whole.values())
    for rank in run_distributed(sharded, ranks, str(base), choice):
        assert rank.keys() == whole.keys()
        for name, (a, b) in rank.items():
            assert torch.equal(a, whole[name].a)
            assert torch.equal(b, whole[name].b)


def test_what_cannot_start_so_is_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    quantize(str(base), str(tmp_path / "small"))
    folder = _saved(started(base, rank=4), tmp_path / "adapter")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (base, {"quantization": "none", "lora": lora}, "`quantization='none'` rounds nothing. Set nf4"),
        (tmp_path / "small", {"lora": lora}, "holds 4-bit weights.* Give the folder that it was made from"),
        (base, {}, "`lora` is null. Set lora"),
        (base, {"lora": lora, "adapter": folder}, "`adapter` brings its own factors. Leave out one"),
    ]
    for path, options, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            load_moe(path, lora_start="rounding_error", **options)
        assert "\n" not in str(raised.value)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    write_safetensors(tmp_path / "adapter/adapter_model.safetensors", tensors, metadata={"mixcn_start_rank": "3"})
    with pytest.raises(ValueError, match=r"has the rank 8, expected a multiple of 2 x 3.*mixcn_start_rank=3"):
        load_found(find_model(folder))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (8, 24)  # plain LoRA of the same scaling
