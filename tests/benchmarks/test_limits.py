"""Work and traffic of a step's limit, and random bases, against a model that is really there."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lightning_mixcn.model import load_moe
from lightning_mixcn.model.memory.optimizer import MemoryTracker
from lightning_mixcn.model.nf4.linear import FrozenLinear

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PRESETS = ["layer-8x7b", "cpu-olmoe", "cpu-qwen3"]
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "width": 256}


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("limits", "random_base"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__


@pytest.mark.parametrize("preset", PRESETS)
def test_a_random_base_is_what_transformers_and_we_load(
    preset: str, imported: Callable[[str], Any], tmp_path: Path
) -> None:
    random_base = imported("random_base")
    random_base.write_random_base(random_base.config_of(preset, **SIZES), tmp_path)
    stock_class: Any = transformers.AutoModelForCausalLM
    stock, report = stock_class.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report.values())
    ours = load_moe(tmp_path, quantization="none")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=2e-2, atol=2e-2)
    assert 0.019 < stock.model.layers[1].mlp.experts.down_proj.float().std() < 0.021


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_drawn_in_memory_has_every_weight_and_trains(preset: str, imported: Callable[[str], Any]) -> None:
    random_base = imported("random_base")
    config = random_base.config_of(preset, **SIZES)
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    model = random_base.random_model(config, lora, torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            assert 0.019 < module.storage.flat(torch.float32).std() < 0.021
    norms = [parameter for name, parameter in model.named_parameters() if name.endswith("norm.weight")]
    assert norms
    assert all((weight == 1).all() for weight in norms)
    ids = torch.arange(20)[None]
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert abs(loss - torch.tensor(2048.0).log()) < 0.5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("mode", "passes"), [("none", (2, 2)), ("selective", (3, 2)), ("full", (3, 3))])
def test_traffic_and_recomputation(
    preset: str, imported: Callable[[str], Any], mode: str, passes: tuple[int, int]
) -> None:
    limit, random_base = imported("limits"), imported("random_base")
    config = random_base.config_of(preset, **SIZES)
    with torch.device("meta"):
        layer = transformers.AutoModelForCausalLM.from_config(config).model.layers[0]
    attention = sum(parameter.numel() for parameter in layer.self_attn.parameters() if parameter.dim() == 2)
    experts = sum(parameter.numel() for parameter in layer.mlp.experts.parameters())
    expected = 2 * (passes[0] * attention + passes[1] * experts) * (0.516 + 2)
    assert limit.decoding_bytes(config, mode) == pytest.approx(expected)
    flops = sum(2 * a * b * c * times for (a, b, c), times in limit.recomputed_products(config, 64, mode))
    chosen = config.num_experts_per_tok / config.num_local_experts
    again = 2 * (passes[0] - 2) * attention + 2 * (passes[1] - 2) * experts * chosen
    assert flops == 2 * 64 * again


def test_operands_of_a_limit_are_no_more_than_its_largest(
    imported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = imported("limits")
    made = list[tuple[Any, ...]]()
    multiply = torch.mm

    def spied(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        made.append((tuple(left.shape), tuple(right.shape), tuple(out.shape), left.untyped_storage().data_ptr()))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", spied)
    with MemoryTracker() as live:
        run = limits.timed([((4, 8, 2), 2), ((2, 3, 16), 1)])
    assert run() > 0
    assert [shapes[:3] for shapes in made] == [((4, 8), (8, 2), (4, 2))] * 2 + [((2, 3), (3, 16), (2, 16))]
    assert len({storage for *_, storage in made}) == 1
    assert live.now == 2 * (4 * 8 + 3 * 16 + 2 * 16)
