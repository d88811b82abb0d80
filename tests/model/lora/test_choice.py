"""`train_only`: what it chooses, what it refuses, and the model that has factors for that only."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.model import MoePeftModel, build_moe, count_parameters, find_model, load_found, load_moe
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.lora.adapter_file import AdapterFile
from lightning_mixcn.model.lora.attach import lora_layers, stored_adapter
from lightning_mixcn.model.lora.choice import TrainOnly, read_choice
from lightning_mixcn.model.lora.trainability import trained_tensors
from lightning_mixcn.testing import save_tiny_model, tiny_config
from tests.model.trained_values import draw_trained

FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
ATTENTION, ROUTER = ["q_proj", "k_proj", "v_proj", "o_proj"], ["linear"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
SOME: TrainOnly = {"experts": {"0": [2], "1": [0, 3]}, "router": False}


def model_of(train_only: Any, family: str = "mixtral", **lora: Any) -> Any:
    settings: dict[str, Any] = {"r": 2, "target_modules": "all-linear"}
    return build_moe(tiny_config(family), lora=LoraConfig(**(settings | lora)), device="meta", train_only=train_only)


def groups_of(model: Any) -> dict[tuple[int, str], list[int]]:
    """Return the numbers of the groups with factors, by layer and projection."""
    return {(int(name.split(".")[2]), name.rpartition(".")[2]): list(layer.slots) for name, layer in lora_layers(model)}


def everything(layers: list[int], names: list[str], numbers: list[int]) -> dict[tuple[int, str], list[int]]:
    return {(layer, name): numbers for layer in layers for name in names}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("train_only", "expected"),
    [
        ({}, everything([0, 1], ATTENTION + ROUTER, [0]) | everything([0, 1], EXPERTS, [0, 1, 2, 3])),
        ({"layers": [1]}, everything([1], ATTENTION + ROUTER, [0]) | everything([1], EXPERTS, [0, 1, 2, 3])),
        ({"experts": [], "attention": False}, everything([0, 1], ROUTER, [0])),
        (
            {"layers": [1], "experts": [3, 0], "router": False},
            everything([1], ATTENTION, [0]) | everything([1], EXPERTS, [0, 3]),
        ),
        (
            {"experts": {"0": [2]}, "router": False, "attention": False, "about": {"made by": "hand"}},
            everything([0], EXPERTS, [2]),
        ),
    ],
)
def test_what_is_chosen_has_factors(
    family: str, train_only: TrainOnly, expected: dict[tuple[int, str], list[int]], tmp_path: Path
) -> None:
    (tmp_path / "choice.json").write_text(json.dumps(train_only))
    for given in (train_only, tmp_path / "choice.json", str(tmp_path / "choice.json")):
        model = model_of(given, family)
        assert groups_of(model) == expected
        for name, layer in lora_layers(model):
            count = len(expected[int(name.split(".")[2]), name.rpartition(".")[2]])
            linear: Any = layer.get_base_layer()
            a, b = layer.weights("default")
            assert a.shape == (2 * count, linear.in_features)
            assert b.shape == (linear.out_features * count, 2)


def test_parameters_fall_with_the_choice() -> None:
    whole, half = (
        count_parameters(model_of(choice, target_modules=["w1", "w2"]))["trainable"]
        for choice in (None, {"experts": [1, 2]})
    )
    assert half * 2 == whole


def test_it_is_what_lora_adapts_less_the_rest() -> None:
    """`layers_to_transform`, `exclude_modules` and patterns are PEFT's own meaning of `lora`, whatever is chosen."""
    model = model_of(
        {"experts": [1]}, layers_to_transform=[1], target_modules=["w1", "w3", "q_proj"], exclude_modules=["w3"],
        rank_pattern={"w1": 3}, alpha_pattern={"q_proj": 5},
    )  # fmt: skip
    assert groups_of(model) == {(1, "gate_proj"): [1], (1, "q_proj"): [0]}
    layers = {name.rpartition(".")[2]: layer for name, layer in lora_layers(model)}
    assert layers["gate_proj"].r["default"] == 3
    assert layers["q_proj"].lora_alpha["default"] == 5


@pytest.mark.parametrize(
    ("train_only", "lora", "message"),
    [
        ({"layer": [0]}, {}, r"'layer', which is not known \(did you mean 'layers'\?\). Expected some of layers"),
        ({"layers": []}, {}, r"`train_only.layers=\[\]`: expected numbers of layers, or leave it out for all"),
        ({"layers": [0, 0]}, {}, r"`train_only.layers=\[0, 0\]` has a number twice"),
        ({"layers": [-1]}, {}, r"`train_only.layers\[0\]=-1`: expected at least 0"),
        ({"layers": [True]}, {}, r"`train_only.layers\[0\]=True`: expected a whole number"),
        ({"layers": None}, {}, "`train_only.layers=None`: expected a list"),
        ({"layers": [2]}, {}, "`train_only.layers` has 2, but the model has layers 0 to 1. Make the choice"),
        ({"experts": {"0": []}}, {}, r"`train_only.experts\['0'\]=\[\]`: expected numbers of experts, or leave out"),
        ({"experts": {"0": [4]}}, {}, "`train_only.experts` has 4, but the model has experts 0 to 3"),
        ({"experts": [4]}, {}, "`train_only.experts` has 4, but the model has experts 0 to 3"),
        ({"experts": [1, 1]}, {}, r"`train_only.experts=\[1, 1\]` has a number twice"),
        ({"experts": {"0": [1, 1]}}, {}, r"`train_only.experts\['0'\]=\[1, 1\]` has a number twice"),
        ({"experts": {"2": [0]}}, {}, "`train_only.experts` has 2, but the model has layers 0 to 1"),
        ({"experts": {"01": [0]}}, {}, "`train_only.experts` has the key '01'. Expected the number of a layer"),
        ({"experts": {"first": [0]}}, {}, "`train_only.experts` has the key 'first'"),
        ({"experts": {"1": [0]}, "layers": [0]}, {}, "names layer 1, which `train_only.layers` leaves"),
        ({"router": "yes"}, {}, "`train_only.router='yes'`: expected true or false"),
        ({"about": 3}, {}, "`train_only.about=3`: expected a mapping"),
        (
            {"experts": [], "router": False, "attention": False}, {},
            "`train_only` leaves nothing of what `lora` adapts. Choose some of it, or set `lora: null`",
        ),
        ({"experts": [1]}, {"target_modules": ["gate"]}, "`train_only.experts` chooses experts, but `lora`"),
        (
            {"experts": {"0": [1], "1": [1]}}, {"layers_to_transform": [1], "target_modules": ["w1"]},
            "`train_only.experts` chooses experts of layer 0, but `lora` adapts none there",
        ),
        (
            {"layers": [0, 1], "experts": {"1": [2]}, "router": False, "attention": False}, {},
            "`train_only.layers` has 0, of which nothing trains",
        ),
    ],
)  # fmt: skip
def test_another_choice_is_refused(train_only: Any, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_of(train_only, **lora)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layers: [1]", "is not valid JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ('{"layers": [1], "layers": [0]}', "the key 'layers' is there twice"),
        ('{"steps": 3}', "`train_only` has the key 'steps', which is not known"),
    ],
)
def test_another_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "choice.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_choice(str(file))
    with pytest.raises(FileNotFoundError, match="Give `train_only` as a JSON file"):
        read_choice(str(tmp_path / "none.json"))


def test_without_lora_it_is_refused() -> None:
    with pytest.raises(UserError, match="`train_only` chooses what has LoRA, but `lora` is null"):
        build_moe(tiny_config("mixtral"), device="meta", train_only={"layers": [1]})


# ---- values ----


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base", request.param)


def load(base: Path, train_only: Any = None, **changes: Any) -> Any:
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    settings: dict[str, Any] = {"quantization": "none", "dtype": "float32", "lora": lora}
    return load_moe(base, **(settings | changes), train_only=train_only)


def copy_chosen(whole: Any, some: Any) -> None:
    """Give a model with some factors those of a model with all."""
    of_whole = dict(lora_layers(whole))
    with torch.no_grad():
        for name, layer in lora_layers(some):
            for mine, all_of_them in zip(layer.masters("default"), of_whole[name].masters("default"), strict=True):
                mine.copy_(all_of_them[list(layer.slots)])


def steps(model: Any, ids: Tensor, count: int = 3) -> None:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for _ in range(count):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_that_of_all_factors_whose_others_stay(base: Path, ids: Tensor, dtype: str) -> None:
    """The oracle has every factor, and the gradients of those that are not chosen are discarded."""
    whole, some = load(base, dtype=dtype), load(base, SOME, dtype=dtype)
    draw_trained(whole, 0.05)
    of_some = {name: layer.slots for name, layer in lora_layers(some)}
    frozen = [parameter.clone() for parameter in some.parameters() if not parameter.requires_grad]
    for name, layer in lora_layers(whole):
        chosen = [number in of_some.get(name, {}) for number in range(layer.groups)]
        for weight in layer.weights("default"):
            rows = torch.tensor(chosen).repeat_interleave(len(weight) // layer.groups)[:, None]
            weight.data.mul_(rows)
            weight.register_hook(lambda gradient, rows=rows: gradient * rows)
    copy_chosen(whole, some)
    for model in (whole, some):
        model.train()
        steps(model, ids)
    expected = dict(lora_layers(whole))
    for name, layer in lora_layers(some):
        for mine, theirs in zip(layer.masters("default"), expected[name].masters("default"), strict=True):
            torch.testing.assert_close(mine, theirs[list(layer.slots)], rtol=1e-4, atol=1e-6)
    still = [parameter for parameter in some.parameters() if not parameter.requires_grad]
    assert all(torch.equal(one, other) for one, other in zip(frozen, still, strict=True))


def test_names_of_what_trains_are_those_of_the_chosen(base: Path) -> None:
    tensors = list(trained_tensors(load(base, SOME), train_embeddings=False))
    experts = [tensor for tensor in tensors if tensor.experts is not None]
    numbers = {tuple(tensor.numbers) for tensor in experts}
    assert numbers == {(2,), (0, 3)}
    for tensor in experts:
        assert [int(name.split(".experts.")[1].split(".")[0]) for name in tensor.names] == list(tensor.numbers)


# PEFT's conversion of w1 and w3 to the fused layout leaves patterns for what is not adapted.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_an_adapter_is_read_back(base: Path, ids: Tensor, tmp_path: Path) -> None:
    """The per-expert layout has every expert of a layer, zeros where none was chosen; stock PEFT computes the same."""
    trained = load(base, SOME)
    draw_trained(trained, 0.1, around_start=False)
    trained.save_pretrained(tmp_path / "adapter")
    file = AdapterFile(tmp_path / "adapter", trained.get_base_model().architecture)
    numbers = {name.split(".experts.")[1].split(".")[0] for name in file.names if ".experts." in name}
    assert numbers == {"0", "1", "2", "3"}
    own = stored_adapter(trained)[0]
    zeros = [name for name in file.names if not file.factors(name).b.any()]
    assert set(file.names) - set(zeros) == own.keys()
    again = load(base, SOME, adapter=tmp_path / "adapter")
    for one, other in zip(trained.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        expected = trained.eval()(input_ids=ids).logits
        found = load_found(find_model(str(tmp_path / "adapter")), quantization="none", dtype="float32")
        torch.testing.assert_close(found(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        for layout in ("hf", "peft-per-expert", "peft"):
            export(str(tmp_path / "adapter"), str(tmp_path / layout), format=layout)
            read = load_found(find_model(str(tmp_path / layout)), quantization="none", dtype="float32")
            torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        if "mixtral" in str(trained.get_base_model().config.model_type):
            stock: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            stock = peft.PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
            torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_continued_without_a_choice_all_experts_train(base: Path, ids: Tensor, tmp_path: Path) -> None:
    """Zeros on disk become a fresh start: with A and B of zeros, neither would ever have a gradient."""
    trained = load(base, {**SOME, "router": True})
    draw_trained(trained, 0.1, around_start=False)
    trained.save_pretrained(tmp_path / "adapter")
    continued: Any = load(base, adapter=tmp_path / "adapter", seed=3)
    fresh = dict(lora_layers(load(base, seed=3)))
    chosen = {name: layer.slots for name, layer in lora_layers(trained)}
    steps(continued.train(), ids, count=2)
    for name, layer in lora_layers(continued):
        if ".experts." not in name:
            continue
        _, b = layer.masters("default")
        assert all(factor.any() for factor in b), name
    again: Any = load(base, adapter=tmp_path / "adapter", seed=3)
    for name, layer in lora_layers(again):
        a, b = layer.masters("default")
        start = fresh[name].masters("default")[0]
        for number in set(range(layer.groups)) - chosen.get(name, {}).keys():
            if ".experts." in name:
                assert torch.equal(a[number], start[number])
                assert not b[number].any()


def test_an_adapter_without_a_router_needs_the_choice(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    load(base, SOME).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        UserError, match=r"has no .*gate.lora_A, but `lora` adapts it here. Leave it out .* `train_only`"
    ):
        load(base, adapter=tmp_path / "adapter")


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    trained = load(base)
    assert isinstance(trained, MoePeftModel)
    draw_trained(trained, 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"trains .*, which `lora.target_modules` or `train_only` leaves out here"):
        load(base, SOME, adapter=tmp_path / "adapter")
