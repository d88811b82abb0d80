"""Runs in which something does not train, on one rank and on several."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig
from torch import Tensor, nn

from lightning_mixcn.callbacks import TrainabilityCheck
from lightning_mixcn.model.lora.attach import lora_layers
from lightning_mixcn.model.lora.trainability import GradientArrivals
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed
from tests.callbacks.ranks_run import CODES, fit_watched

Make = Callable[..., Trainer]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
BATCHES = [random_batch([24, 24, 9], seed=seed) for seed in range(6)]


class Spoiled(PretrainModule):
    """Has something done to its model as soon as it is there, and after each backward pass."""

    spoil: Callable[[nn.Module], object] = staticmethod(lambda model: None)
    after_backward: Callable[[nn.Module], object] = staticmethod(lambda model: None)

    def configure_model(self) -> None:
        super().configure_model()
        assert self.model is not None
        self.spoil(self.model)

    def on_after_backward(self) -> None:
        assert self.model is not None
        self.after_backward(self.model)


def made(base: Path, **changes: Any) -> Spoiled:
    settings: dict[str, Any] = {"dtype": "float32", "lora": LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)}
    return Spoiled(str(base), **(settings | changes))


def layer(model: nn.Module, name: str) -> Any:
    return dict(lora_layers(model))[name]


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("none", {}),
        ("full", {}),
        ("selective", {"quantization": "none"}),
        ("selective", {"train_embeddings": True}),
    ],
)
def test_a_good_run(mode: Any, settings: dict[str, Any], trainer: Make, tiny_base: Path) -> None:
    check = TrainabilityCheck()
    run = trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[check])
    pending: list[int] = []
    module = made(tiny_base, activation_checkpointing=mode, **settings)
    module.on_train_batch_end = lambda *_: pending.append(len(check._pending))  # type: ignore[method-assign]  # to look on
    run.fit(module, FixedBatches(BATCHES))
    # After the first step, two micro-batches, the As of 2 · 8 projections: they have no gradient while B is 0.
    assert pending[1:4] == [16, 16, 0]


def test_a_frozen_adapter(trainer: Make, tiny_base: Path) -> None:
    module = made(tiny_base)
    name = "model.layers.1.self_attn.k_proj"
    module.spoil = lambda model: layer(model, name).lora_B["default"].requires_grad_(False)
    with pytest.raises(RuntimeError, match=f"optimizer does not have {name}.lora_B, which should train"):
        trainer(callbacks=[TrainabilityCheck()]).fit(module, FixedBatches(BATCHES))


def test_frozen_embeddings(trainer: Make, tiny_base: Path) -> None:
    module = made(tiny_base, train_embeddings=True)
    module.spoil = lambda model: model.get_submodule("base_model.model.model.embed_tokens").requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"optimizer does not have model.embed_tokens, which should train"):
        trainer(callbacks=[TrainabilityCheck()]).fit(module, FixedBatches(BATCHES))


def test_an_adapter_without_any_gradient(trainer: Make, tiny_base: Path) -> None:
    module = made(tiny_base)

    def drop(model: nn.Module) -> None:
        layer(model, "model.layers.0.mlp.experts.up_proj").lora_B["default"].weight.grad = None

    module.after_backward = drop
    with pytest.raises(
        RuntimeError,
        match=r"step 0 .* no gradient for model.layers.0.block_sparse_moe.experts.0.w3.lora_B, .* and 1 more, which",
    ):
        trainer(callbacks=[TrainabilityCheck()]).fit(module, FixedBatches(BATCHES))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("factor", "step"), [("B", 0), ("A", 1)])
def test_one_detached_expert_among_others(
    factor: str, step: int, accumulate: int, trainer: Make, tiny_base: Path
) -> None:
    """A's first gradient comes in the second step, so that is when its want is seen."""
    module = made(tiny_base)

    def detach(model: nn.Module) -> None:
        adapted = layer(model, "model.layers.1.mlp.experts.down_proj")
        weights = {"A": adapted.lora_A, "B": adapted.lora_B}[factor]["default"].weight
        weights.grad.view(4, -1)[2].zero_()

    module.after_backward = detach
    name = f"model.layers.1.block_sparse_moe.experts.2.w2.lora_{factor}"
    run = trainer(callbacks=[TrainabilityCheck()], max_steps=3, accumulate_grad_batches=accumulate)
    with pytest.raises(RuntimeError, match=rf"Optimizer step {step} .* no gradient for {name}, which should train"):
        run.fit(module, FixedBatches(BATCHES))


def keep_away(model: nn.Module) -> None:
    """No token is sent to expert 3 of the first layer."""
    router: Any = model.get_submodule("base_model.model.model.layers.0.mlp.gate")
    forward = type(router).forward

    def without(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = forward(router, hidden)
        return logits, weights, torch.where(index == 3, (index.flip(1) + 1) % 3, index)

    router.forward = without


def test_an_expert_without_tokens_waits(trainer: Make, tiny_base: Path) -> None:
    module = made(tiny_base)
    module.spoil = keep_away
    names = ", ".join(f"model.layers.0.block_sparse_moe.experts.3.{name}.lora_B" for name in ("w1", "w3", "w2"))
    check = TrainabilityCheck()
    with pytest.warns(UserWarning, match=f"no gradient has come back to {names}, for want of tokens"):
        trainer(max_steps=3, callbacks=[check]).fit(module, FixedBatches(BATCHES))


def test_an_expert_is_checked_once_tokens_come(trainer: Make, tiny_base: Path) -> None:
    """Tokens reach expert 3 from the third step on, where its gradient is lost."""
    module = made(tiny_base)
    module.spoil = keep_away

    def lose(model: nn.Module) -> None:
        if module.global_step == 1:
            router: Any = model.get_submodule("base_model.model.model.layers.0.mlp.gate")
            del router.forward
        layer(model, "model.layers.0.mlp.experts.up_proj").lora_B["default"].weight.grad.view(4, -1)[3].zero_()

    module.after_backward = lose
    with pytest.raises(RuntimeError, match=r"Optimizer step 2 .* model.layers.0.block_sparse_moe.experts.3.w3.lora_B,"):
        trainer(max_steps=4, callbacks=[TrainabilityCheck()]).fit(module, FixedBatches(BATCHES))


@pytest.mark.parametrize(("at", "step"), [(0, 1), (2, 3)])
def test_a_changed_code(at: int, step: int, trainer: Make, tiny_base: Path) -> None:
    module = made(tiny_base)
    name = "base_model.model.model.layers.1.mlp.experts.up_proj.base_layer.storage.codes"

    def change(model: nn.Module) -> None:
        if module.global_step == at:
            model.get_parameter(name).data[0, 77] ^= 1

    module.after_backward = change
    with pytest.raises(RuntimeError, match=f"{name} changed up to optimizer step {step}, though frozen"):
        trainer(max_steps=3, callbacks=[TrainabilityCheck()]).fit(module, FixedBatches(BATCHES))


def test_experts_that_are_not_in_4_bits(trainer: Make, tiny_base: Path) -> None:
    module = made(tiny_base, quantization="none")
    module.spoil = lambda _: setattr(module, "quantization", "nf4")
    with pytest.raises(RuntimeError, match=r"14 projections are not in 4 bits, the first is model.layers.0.self_attn"):
        trainer(callbacks=[TrainabilityCheck()]).fit(module, FixedBatches(BATCHES))


def test_it_only_looks_while_it_has_to(trainer: Make, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = GradientArrivals.take

    def counted(self: GradientArrivals) -> Any:
        taken.append(1)
        return take(self)

    monkeypatch.setattr(GradientArrivals, "take", counted)
    trainer(max_steps=5, callbacks=[TrainabilityCheck()]).fit(made(tiny_base), FixedBatches(BATCHES))
    assert len(taken) == 2


def test_another_module_is_refused(trainer: Make) -> None:
    class Other(LightningModule):
        pass

    with pytest.raises(ValueError, match=r"TrainabilityCheck works with a CausalLMModule, but `model` is Other"):
        TrainabilityCheck().setup(trainer(), Other(), "fit")


@pytest.mark.multiprocess
def test_two_ranks(tiny_base: Path, tmp_path: Path) -> None:
    """All ranks end alike, also where one alone sees what is wrong."""
    cases = [(name, what) for name in ("fsdp2", "ddp") for what in ("good", "detached", "changed")]
    of_ranks = run_distributed(fit_watched, 2, cases, str(tiny_base), str(tmp_path))
    assert of_ranks[0] == of_ranks[1]
    for (name, what), error in zip(cases, of_ranks[0], strict=True):
        if what == "good":
            assert error == "", name
        if what == "detached":
            assert "no gradient for model.layers.1.block_sparse_moe.experts.2.w3.lora_B, which should" in error
        if what == "changed":
            assert f"model.{CODES} changed up to optimizer step 1, though frozen" in error
    # Four micro-batches of 53 tokens on each rank in the first two steps.
    with next((tmp_path / "fsdp2" / "good").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/tokens_per_second_per_device"]]
    rate, seconds = (
        float(rows[0][f"throughput/{name}"]) for name in ("tokens_per_second_per_device", "seconds_per_step")
    )
    assert rate * seconds * 2 == pytest.approx(4 * 53)
