"""Options of PEFT's LoraConfig: every field of the installed release, in training and in an adapter on disk."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora.config as lora_config
import pytest
import torch
import transformers
from torch import Tensor

from lightning_mixcn.model import build_mixtral, find_model, load_found
from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.lora.adapter_file import AdapterFile
from lightning_mixcn.testing import tiny_mixtral_config
from tests.model.export.test_folder import logits_of, stock_logits

# A value of every field other than its default: what is implemented (and tested elsewhere), what only describes.
IMPLEMENTED: dict[str, Any] = {
    "r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "use_rslora": True, "init_lora_weights": "gaussian",
    "rank_pattern": {"w1": 2}, "alpha_pattern": {"w1": 3}, "target_modules": ["w1"], "exclude_modules": ["gate"],
    "layers_to_transform": [1], "task_type": "CAUSAL_LM", "base_model_name_or_path": "somewhere",
    "inference_mode": True, "auto_mapping": {"base_model_class": "X"}, "peft_version": "0.15.0",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "revision": "v2", "fan_in_fan_out": True, "bias": "lora_only", "modules_to_save": ["lm_head"],
    "megatron_config": {"a": 1}, "megatron_core": "other", "trainable_token_indices": [1],
    "loftq_config": None, "eva_config": lora_config.EvaConfig(), "corda_config": lora_config.CordaConfig(),
    "lora_ga_config": lora_config.LoraGAConfig(), "use_dora": True, "velora_config": lora_config.VeloraConfig(),
    "alora_invocation_tokens": [5], "use_qalora": True, "qalora_group_size": 8,
    "monteclora_config": lora_config.MontecloraConfig(), "layer_replication": [(0, 1)],
    "runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True), "lora_bias": True,
    "target_parameters": ["mlp.experts.down_proj"], "use_bdlora": lora_config.BdLoraConfig(),
    "arrow_config": lora_config.ArrowConfig(), "kasa_config": lora_config.KasaConfig(), "ensure_weight_tying": True,
}  # fmt: skip
ELSEWHERE = {"peft_type", "layers_pattern"}  # see below and test_lora_targets


def test_every_option_of_the_installed_peft_is_known_here() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == IMPLEMENTED.keys() | REFUSED.keys() | ELSEWHERE


def config(**options: Any) -> peft.LoraConfig:
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if "layers_to_transform" in options:
        settings["target_modules"] = ["w1"]
    return peft.LoraConfig(**(settings | options))


@pytest.mark.filterwarnings("ignore:.*will be ignored when:UserWarning")  # PEFT's, of a start's own options
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "loftq_config"])  # PEFT empties that itself
def test_an_option_that_is_not_implemented_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^`lora\.{name}=.*is not supported here"):
        build_mixtral(tiny_mixtral_config(), lora=config(**{name: REFUSED[name]}), device="meta")


@pytest.mark.parametrize("name", IMPLEMENTED)
def test_an_option_that_is_implemented_is_taken(name: str) -> None:
    build_mixtral(tiny_mixtral_config(), lora=config(**{name: IMPLEMENTED[name]}), device="meta")


def test_an_option_of_a_later_release_is_refused() -> None:
    later = dataclasses.make_dataclass("Later", [("use_something", bool, False)], bases=(peft.LoraConfig,))
    with pytest.raises(ValueError, match=r"`lora\.use_something=True` is not supported"):
        build_mixtral(tiny_mixtral_config(), lora=later(r=4, target_modules=["w1"], use_something=True), device="meta")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"init_lora_weights": start}, "expected true, false or gaussian") for start in (
            "pissa", "pissa_niter_4", "olora", "orthogonal", "lora_ga", "mica")),
        ({"task_type": "SEQ_CLS"}, "expected CAUSAL_LM"),
    ],
)  # fmt: skip
def test_values_that_are_not_implemented(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixtral(tiny_mixtral_config(), lora=config(**options), device="meta")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"r": rank}, r"`lora\.r=.*: expected (at least 1 \(a rank such|a whole number)")
          for rank in (0, -1, 2.5, True, "x")),
        *(({"rank_pattern": {"w1": rank}}, r"`lora\.rank_pattern\['w1'\]=") for rank in (0, True, None, "2", 2.0)),
        *(({"lora_alpha": alpha}, r"`lora\.lora_alpha=.*: expected (more than 0 \(it scales|a finite number|a number)")
          for alpha in (0, -1, math.inf, math.nan, None, True, "x")),
        *(({"alpha_pattern": {"w1": alpha}}, r"`lora\.alpha_pattern\['w1'\]=")
          for alpha in (0, math.inf, math.nan, None, True, "3")),
        *(({"lora_dropout": rate}, r"`lora\.lora_dropout=.*: expected (at least 0|less than 1|a (finite )?number)")
          for rate in (1, 1.0, -0.1, 1.5, math.nan, None, True, "0.1")),
        ({"rank_pattern": ["w1"]}, r"`lora\.rank_pattern=\['w1'\]`: expected null or a mapping"),
        ({"alpha_pattern": 3}, r"`lora\.alpha_pattern=3`: expected null or a mapping"),
    ],
)  # fmt: skip
def test_values_that_are_no_ranks_scales_or_rates(options: dict[str, Any], message: str) -> None:
    given = config()
    for name, value in options.items():  # past PEFT's own checks, which differ by release
        setattr(given, name, value)
    with pytest.raises(ValueError, match=message) as raised:
        build_mixtral(tiny_mixtral_config(), lora=given, device="meta")
    assert "\n" not in str(raised.value)


def test_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`lora` is of type 'ADALORA'"):
        build_mixtral(
            tiny_mixtral_config(), lora=peft.AdaLoraConfig(target_modules=["w1"], total_step=9), device="meta"
        )


TARGETS = ["q_proj", "v_proj", "o_proj"]  # linear in transformers 5: what these starts know


def train_in_peft(base: Path, folder: Path, *, convert: bool = False, **options: Any) -> Tensor:
    """Start an adapter in stock PEFT, change it as training would, and save it; ``[2, 40, vocab]`` of the result."""
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(
        stock, peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    )
    if convert:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder.parent / "initial")
        model.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    ids = torch.arange(3, 83).view(2, 40)
    expected = logits_of(model, ids)
    extra = {"path_initial_model_for_weight_conversion": str(folder.parent / "initial")} if convert else {}
    model.save_pretrained(folder, **extra)
    return expected


IDS = torch.arange(3, 83).view(2, 40)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")  # PEFT's, while it converts
def test_a_start_that_changed_the_base_is_refused_until_peft_converts_it(
    base: Path, tmp_path: Path, start: str, rslora: bool
) -> None:
    train_in_peft(base, tmp_path / "raw", init_lora_weights=start, use_rslora=rslora)
    for use in (lambda: find_model(str(tmp_path / "raw")), lambda: export(str(tmp_path / "raw"), str(tmp_path / "x"))):
        with pytest.raises(
            ValueError, match=rf"init_lora_weights='{start}', which changed the base.*path_initial_model"
        ):
            use()
    expected = train_in_peft(base, tmp_path / "plain/adapter", convert=True, init_lora_weights=start, use_rslora=rslora)
    model = load_found(find_model(str(tmp_path / "plain/adapter")), quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-3, atol=1e-3)
    export(str(tmp_path / "plain/adapter"), str(tmp_path / "merged"))
    torch.testing.assert_close(stock_logits(tmp_path / "merged", IDS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica", "eva"])
@pytest.mark.filterwarnings("ignore:.*eva.*:UserWarning")  # PEFT's, without activations to start from
def test_a_start_beside_the_base_is_plain_lora(tiny: Path, tmp_path: Path, start: bool | str) -> None:
    expected = train_in_peft(tiny, tmp_path / "adapter", init_lora_weights=start)
    model = load_found(find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_file_without_a_start_is_plain_lora(tiny: Path, tmp_path: Path) -> None:
    """PEFT reads null as no start at all."""
    expected = train_in_peft(tiny, tmp_path / "adapter")
    change(tmp_path / "adapter", init_lora_weights=None)
    model = load_found(find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        *({"r": rank} for rank in (0, -4, None, True, "x", 4.0, [4])),
        *({"lora_alpha": alpha} for alpha in (None, True, "x", math.inf, math.nan, [6])),
        *({"rank_pattern": pattern} for pattern in ({"w1": 0}, {"w1": None}, {"w1": "2"}, {"w1": True}, ["w1"], "w1")),
        *({"alpha_pattern": pattern} for pattern in ({"w1": None}, {"w1": "2"}, {"w1": math.inf}, [["w1", 2]], 3)),
        *({"use_rslora": value} for value in ("false", 2)),
    ],
)
def test_odd_values_in_a_file_are_one_line(settings: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    train_in_peft(tiny, tmp_path)
    change(tmp_path, **settings)
    (name,) = settings
    with pytest.raises(
        ValueError, match=rf"adapter_config\.json(?: has {name}.*expected |' is not valid JSON).*Copy it again$"
    ) as raised:
        AdapterFile(tmp_path, architecture_named("mixtral"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [{"rank_pattern": None, "alpha_pattern": None}, {"lora_alpha": 6.5}])
def test_patterns_may_be_null(settings: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    train_in_peft(tiny, tmp_path)
    change(tmp_path, **settings)
    adapter = AdapterFile(tmp_path, architecture_named("mixtral"))
    assert adapter.factors(adapter.names[0]).scaling == settings.get("lora_alpha", 6) / 4


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "of a later release"])
def test_other_starts_in_a_file_are_refused(tiny: Path, tmp_path: Path, start: str) -> None:
    train_in_peft(tiny, tmp_path)
    change(tmp_path, init_lora_weights=start, loftq_config={"loftq_bits": 4} if start == "loftq" else {})
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changed the base"):
        AdapterFile(tmp_path, architecture_named("mixtral"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_dora", True), ("lora_bias", True), ("trainable_token_indices", [1]), ("layer_replication", [[0, 1]]),
     ("use_qalora", True), ("arrow_config", {"top_k": 2}), ("fan_in_fan_out", True), ("option_of_a_later_release", 3)],
)  # fmt: skip
def test_options_in_a_file_that_change_its_meaning_are_refused(
    tiny: Path, tmp_path: Path, name: str, value: Any
) -> None:
    train_in_peft(tiny, tmp_path)
    change(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"was trained with {name}="):
        AdapterFile(tmp_path, architecture_named("mixtral"))


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
