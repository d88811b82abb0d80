"""LoRA through PEFT: fresh adapters, training, disabling, saving, merging, and stock PEFT reading the result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mixcn.model import MoePeftModel, load_mixtral
from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.model.lora.attach import lora_layers
from tests.model.trained_values import draw_trained

ALL = list(architecture_named("mixtral").short_names)


def adapted(base: Path, quantization: str = "none", adapter: Path | None = None, **lora: Any) -> MoePeftModel:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL}
    config = peft.LoraConfig(**(settings | lora))
    model = load_mixtral(base, quantization=quantization, dtype="float32", lora=config, adapter=adapter)
    assert isinstance(model, MoePeftModel)
    return model


def randomise(model: Any) -> MoePeftModel:
    assert isinstance(model, MoePeftModel)
    draw_trained(model, 0.1, around_start=False)
    return model


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_fresh_adapters_change_nothing_and_disabling_gives_the_base_back(
    base: Path, ids: Tensor, quantization: str
) -> None:
    expected = load_mixtral(base, quantization=quantization, dtype="float32")(input_ids=ids).logits
    model = adapted(base, quantization)
    assert isinstance(model, peft.PeftModel)
    assert torch.equal(model(input_ids=ids).logits, expected)
    randomise(model)
    assert not torch.equal(model(input_ids=ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_every_factor_trains_in_float32_whatever_the_compute_type(tiny: Path, ids: Tensor) -> None:
    model = load_mixtral(tiny, lora=peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    randomise(model)
    model.train()
    model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"rank_pattern": {"w1": 2, "q_proj": 3}, "alpha_pattern": {"w2": 5}},
             {"target_modules": ["w1", "gate"]}, {"target_modules": ["q_proj"]}],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # PEFT's own rewriting
def test_stock_peft_reads_what_is_saved(base: Path, ids: Tensor, tmp_path: Path, lora: dict[str, Any]) -> None:
    model = randomise(adapted(base, **lora))
    model.save_pretrained(tmp_path)
    stock = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, theirs, rtol=1e-4, atol=1e-4)


def test_saved_adapter_loads_again(base: Path, ids: Tensor, tmp_path: Path) -> None:
    model = randomise(adapted(base, "nf4"))
    model.save_pretrained(tmp_path)
    again = adapted(base, "nf4", adapter=tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "gate"]},
        {"layers_to_transform": [1]},
        {"target_modules": ["w1", "w2", "w3"], "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_an_adapter_brings_its_own_configuration(base: Path, ids: Tensor, tmp_path: Path, lora: dict[str, Any]) -> None:
    model = randomise(adapted(base, "nf4", **lora))
    model.save_pretrained(tmp_path)
    again = load_mixtral(base, dtype="float32", adapter=tmp_path)
    assert isinstance(again, MoePeftModel)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    for (name, layer), (other, given) in zip(lora_layers(again), lora_layers(model), strict=True):
        assert (name, layer.r, layer.scaling) == (other, given.r, given.scaling)
    assert [(n, p.shape) for n, p in again.named_parameters() if p.requires_grad] == [
        (n, p.shape) for n, p in model.named_parameters() if p.requires_grad
    ]


def test_w1_on_disk_is_the_gate_of_its_expert(tiny: Path, tmp_path: Path) -> None:
    model = randomise(adapted(tiny))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    a, b = dict(lora_layers(model))["model.layers.1.mlp.experts.gate_proj"].masters("default")
    prefix = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w1"
    assert torch.equal(stored[f"{prefix}.lora_A.weight"], a[3])
    assert torch.equal(stored[f"{prefix}.lora_B.weight"], b[3])


def test_trained_embeddings_are_saved_and_read_by_stock_peft(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, target_modules=ALL)
    model = randomise(load_mixtral(tiny, quantization="none", dtype="float32", lora=lora, train_embeddings=True))
    model.save_pretrained(tmp_path)
    stock = transformers.MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="pattern keys"):
        theirs = peft.PeftModel.from_pretrained(stock, tmp_path).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_merging_keeps_the_logits(base: Path, ids: Tensor) -> None:
    model = randomise(adapted(base))
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert not list(lora_layers(merged))
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_merging_and_unmerging_in_place(tiny: Path, ids: Tensor) -> None:
    model = randomise(adapted(tiny))
    expected = model(input_ids=ids).logits
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_merging_into_four_bits_warns_and_rounds_no_more_than_quantisation(tiny: Path, ids: Tensor) -> None:
    model = randomise(adapted(tiny, "nf4"))
    expected = model(input_ids=ids).logits
    with model.disable_adapter():
        moved = (model(input_ids=ids).logits - expected).norm()
    with pytest.warns(UserWarning, match="quantises them again"):
        merged = model.merge_and_unload()
    assert (merged(input_ids=ids).logits - expected).norm() < moved


def test_seed_decides_the_start_and_leaves_the_global_generator(tiny: Path) -> None:
    lora = peft.LoraConfig(r=4, target_modules=ALL)
    before = torch.get_rng_state()
    starts = [load_mixtral(tiny, lora=lora, seed=seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert any(not torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "up_prj"]}, "names 'up_prj', which matches nothing"),
        ({"target_modules": []}, "expected a list"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"exclude_modules": ALL}, "leaves nothing"),
        ({"bias": "all"}, "no biases"),
    ],
)
def test_unsuitable_options_are_refused(tiny: Path, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(tiny, **lora)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if name in key]:
            del tensors[key]

    return remove


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("experts.2.w2"), r"has no .*experts\.2\.w2\.lora_A"),
        (lambda t: t.update({key: value[:2] for key, value in t.items() if "lora_A" in key}), "do not fit each other"),
        (
            lambda t: t.update({key: value[:2] if "lora_A" in key else value[:, :2] for key, value in t.items()}),
            "Set `lora.r=2`",
        ),
        (lambda t: t.update({"base_model.model.lm_head.lora_B.weight": torch.ones(3, 4)}), "lm_head.lora_A"),
    ],
)
def test_broken_adapters_are_refused(
    tiny: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    adapted(tiny).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        adapted(tiny, adapter=tmp_path)
