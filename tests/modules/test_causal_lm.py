"""The module against plain transformers and torch: loss, accumulation, padding, errors, what is logged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mixcn.callbacks.clocks import StepClock
from lightning_mixcn.modules import CausalLMModule, PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def concatenated(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class Recorder(Callback):
    """What was logged at each optimizer step, and each step's gradients as the optimizer saw them."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def stock_model(base: Path) -> Any:
    model: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.eval()


def test_loss_and_auxiliary_loss_are_those_of_transformers(tiny_base: Path, lora: Make, trainer: Make) -> None:
    batch = random_batch([24, 24])
    module = PretrainModule(str(tiny_base), quantization="none", dtype="float32", lora=lora())
    recorder = Recorder()
    trainer(max_steps=1, callbacks=[recorder, StepClock()]).fit(module, FixedBatches([batch]))
    with torch.no_grad():
        expected = stock_model(tiny_base)(batch["input_ids"], labels=batch["labels"], output_router_logits=True)
    logged = recorder.logged[0]
    # float32 sums in another order.
    assert logged["train/auxiliary_loss"] == pytest.approx(float(expected.aux_loss), rel=1e-5)
    nll = float(expected.loss) - stock_model(tiny_base).config.router_aux_loss_coef * float(expected.aux_loss)
    assert logged["train/nll_nats_per_token"] == pytest.approx(nll, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(nll + 0.02 * float(expected.aux_loss), rel=1e-5)
    assert logged["train/gradient_norm"] > 0
    assert module.trainer.callback_metrics["throughput/tokens_per_second"] > 0


def test_accumulation_equals_the_large_batch(tiny_base: Path, lora: Make, trainer: Make) -> None:
    """Micro-batches of 46, 3 and 20 labels; the coefficient is 0, since the auxiliary loss is not a sum over tokens."""
    pieces = [random_batch([24, 24], seed=0), random_batch([3, 2], seed=1), random_batch([2, 20], seed=2)]
    ends = []
    for batches, accumulated in ((pieces, 3), ([concatenated(pieces)], 1)):
        module = PretrainModule(
            str(tiny_base),
            dtype="float32",
            lora=lora(init_lora_weights="gaussian"),
            router_aux_loss_coef=0.0,
            optimizer=sgd,
            lr_scheduler=constant,
        )
        data = FixedBatches(batches)
        trainer(max_steps=2, max_epochs=2, accumulate_grad_batches=accumulated).fit(module, data)
        ends.append({name: value.clone() for name, value in module.state_dict().items()})
    in_pieces, large = ends
    changed = [name for name in large if "lora_B" in name]
    assert changed
    for name in changed:
        assert large[name].abs().max() > 1e-6
        # Both are float32 sums over the same tokens in another order.
        torch.testing.assert_close(in_pieces[name], large[name], rtol=1e-4, atol=1e-7)


def test_the_auxiliary_loss_is_weighted_by_tokens(tiny_base: Path, lora: Make, trainer: Make) -> None:
    pieces = [random_batch([24, 24], seed=0), random_batch([3, 2], seed=1)]
    module = PretrainModule(str(tiny_base), quantization="none", dtype="float32", lora=lora())
    recorder = Recorder()
    trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[recorder]).fit(module, FixedBatches(pieces))
    stock, losses = stock_model(tiny_base), []
    for piece in pieces:
        mask = (piece["document_ids"] >= 0).long()
        with torch.no_grad():
            losses.append(float(stock(piece["input_ids"], attention_mask=mask, output_router_logits=True).aux_loss))
    expected = (46 * losses[0] + 3 * losses[1]) / 49
    assert recorder.logged[-1]["train/auxiliary_loss"] == pytest.approx(expected, rel=1e-5)


def test_padding_changes_nothing(tiny_base: Path, lora: Make, trainer: Make) -> None:
    ends = []
    for length in (10, 24):
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora(), optimizer=sgd, lr_scheduler=constant)
        recorder = Recorder()
        batch = random_batch([10, 10], sequence_length=10)
        if length > 10:
            wide = random_batch([10, 10], sequence_length=length)
            for name in batch:
                wide[name][:, :10] = batch[name]
            batch = wide
        trainer(max_steps=1, callbacks=[recorder]).fit(module, FixedBatches([batch]))
        ends.append((module.state_dict(), recorder.logged[0]))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=1e-5, atol=1e-7)
    for tag in ("train/loss", "train/auxiliary_loss", "train/gradient_norm"):
        assert ends[1][1][tag] == pytest.approx(ends[0][1][tag], rel=1e-5)


def test_the_gradient_norm_is_that_before_clipping(tiny_base: Path, lora: Make, trainer: Make) -> None:
    norms = []
    for clip in (None, 1e-3):
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora(), optimizer=sgd, lr_scheduler=constant)
        recorder = Recorder()
        trainer(max_steps=1, gradient_clip_val=clip, callbacks=[recorder]).fit(
            module, FixedBatches([random_batch([9])])
        )
        norms.append(recorder.logged[0]["train/gradient_norm"])
    assert norms[0] == norms[1] > 1e-3
    moved = [value for name, value in module.state_dict().items() if "lora_B" in name]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(1e-3, rel=1e-3)  # a step of SGD from B = 0


def test_dropout_is_on_while_training(tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), dtype="float32", lora=lora(lora_dropout=0.5))
    trainer(max_steps=1).fit(module, FixedBatches([random_batch([9])]))
    assert module.model is not None
    dropouts = [child for child in module.model.modules() if isinstance(child, torch.nn.Dropout) and child.p == 0.5]
    assert all(child.training for child in [module.model, *dropouts])


def test_it_overfits(tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(
        str(tiny_base),
        dtype="float32",
        lora=lora(r=16),
        train_embeddings=True,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    recorder = Recorder()
    data = FixedBatches([random_batch([24, 20])])
    trainer(max_steps=60, max_epochs=60, callbacks=[recorder], log_every_n_steps=1).fit(module, data)
    losses = [logged["train/nll_nats_per_token"] for logged in recorder.logged]
    assert losses[0] > 5
    assert losses[-1] < 0.5


def test_mixed_precision_computes_what_32_true_does(tiny_base: Path, lora: Make, trainer: Make) -> None:
    ends = []
    for precision in ("32-true", "bf16-mixed"):
        module = PretrainModule(str(tiny_base), lora=lora())
        trainer(precision=precision, max_steps=1).fit(module, FixedBatches([random_batch([9])]))
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert {value.dtype for value in ends[0].values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_cast_masters_are_refused(precision: str, tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), lora=lora())
    with pytest.raises(ValueError, match=rf"`trainer.precision='{precision}'`.*Set `trainer.precision: 32-true`"):
        trainer(precision=precision).fit(module, FixedBatches([random_batch([9])]))


def test_a_loss_that_is_not_finite_stops_the_run(tiny_base: Path, lora: Make, trainer: Make) -> None:
    class Broken(PretrainModule):
        def compute_loss(self, batch: Any, output: Any) -> tuple[Tensor, Tensor]:
            loss, count = super().compute_loss(batch, output)
            return loss * (float("nan") if self.trainer.global_step == 2 else 1.0), count

    module = Broken(str(tiny_base), lora=lora())
    before: list[dict[str, Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            before.append({name: value.clone() for name, value in module.state_dict().items()})

    data = FixedBatches([random_batch([9])])
    with pytest.raises(FloatingPointError, match=r"loss of optimizer step 2 \(from 0\) is nan.*lower learning rate"):
        trainer(max_steps=4, max_epochs=4, callbacks=[Keep()]).fit(module, data)
    assert len(before) == 2
    assert all(torch.equal(value, before[-1][name]) for name, value in module.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_base: Path, lora: Make, trainer: Make) -> None:
    class Broken(PretrainModule):
        def on_after_backward(self) -> None:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            gradients[0].fill_(torch.inf)

    with pytest.raises(FloatingPointError, match="gradient norm of optimizer step 0"):
        trainer().fit(Broken(str(tiny_base), lora=lora()), FixedBatches([random_batch([9])]))


def test_nothing_to_train_is_an_error(tiny_base: Path, trainer: Make) -> None:
    with pytest.raises(ValueError, match="Nothing trains: `lora` is null and `train_embeddings` is false"):
        trainer().fit(PretrainModule(str(tiny_base)), FixedBatches([random_batch([9])]))


def test_an_unlimited_run_needs_a_length_for_its_schedule(tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), lora=lora())
    with pytest.raises(ValueError, match=r"`trainer.max_steps=-1`: WarmupCosine needs the number of optimizer steps"):
        trainer(max_steps=-1, max_epochs=1).fit(module, FixedBatches([random_batch([9])]))


def test_a_step_without_labels_is_an_error(tiny_base: Path, lora: Make, trainer: Make) -> None:
    batch = random_batch([9])
    batch["labels"].fill_(-100)
    with pytest.raises(ValueError, match="Optimizer step 0 holds no token with a label"):
        trainer().fit(PretrainModule(str(tiny_base), lora=lora()), FixedBatches([batch]))


def test_only_what_trains_is_optimised(tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), lora=lora(target_modules=["w1", "w2", "w3"]), train_embeddings=True)
    trainer(max_steps=1).fit(module, FixedBatches([random_batch([9])]))
    optimised = [parameter for group in module.trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert len(optimised) == len(module.state_dict()) > 2
    assert all(parameter.requires_grad for parameter in optimised)


def test_plateau_schedulers_are_given_what_they_watch(tiny_base: Path, lora: Make, trainer: Make) -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau

    module = PretrainModule(
        str(tiny_base), lora=lora(), lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="train/loss")
    )
    trainer(max_steps=1).fit(module, FixedBatches([random_batch([9])]))
    assert module.trainer.lr_scheduler_configs[0].monitor == "train/loss"


def test_the_readme_s_subclass_changes_the_loss(tiny_base: Path, lora: Make, trainer: Make) -> None:
    class WeightedSources(PretrainModule):
        """The first source's tokens count more.

        Args:
            first_source_weight: How much more.
        """

        def __init__(self, first_source_weight: float = 3.0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.first_source_weight = first_source_weight

        def compute_loss(self, batch: dict[str, Tensor], output: Any) -> tuple[Tensor, Tensor]:
            weight = torch.where(batch["source_ids"] == 0, self.first_source_weight, 1.0)
            return (output.nll * weight).sum(), (weight * (batch["labels"] != -100)).sum()

    batch = random_batch([24, 13], sources=2)
    settings: dict[str, Any] = {"base": str(tiny_base), "dtype": "float32", "lora": lora(), "router_aux_loss_coef": 0.0}
    logged = []
    for module in (PretrainModule(**settings), WeightedSources(first_source_weight=5.0, **settings)):
        recorder = Recorder()
        trainer(max_steps=1, callbacks=[recorder]).fit(module, FixedBatches([batch], ["zh", "en"]))
        logged.append(recorder.logged[0])
    with torch.no_grad():
        module.eval()
        nll = module(batch).nll.sum(1)
    assert module.hparams["first_source_weight"] == 5.0
    assert logged[0]["train/nll_nats_per_token"] == logged[1]["train/nll_nats_per_token"]
    module.train()
    trained = float((5 * nll[0] + nll[1]) / (5 * 23 + 12))
    # One step of the optimizer at its warm-up learning rate is between the two.
    assert logged[1]["train/loss"] == pytest.approx(trained, rel=1e-2)
    assert abs(logged[1]["train/loss"] - logged[0]["train/loss"]) > 1e-4


def test_the_base_class_trains_too(tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = CausalLMModule(str(tiny_base), lora=lora())
    trainer(max_steps=1).fit(module, FixedBatches([random_batch([9])]))
    assert module.trainer.global_step == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_base: Path, lora: Make, trainer: Make) -> None:
    data = FixedBatches([random_batch([9])])
    data.tokenizer = type("Large", (), {"vocab_size": 300, "path": "somewhere"})()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="somewhere has 300 pieces, but the model has 272 embeddings"):
        trainer().fit(PretrainModule(str(tiny_base), lora=lora()), data)


def test_a_missing_base_is_an_error(tmp_path: Path, trainer: Make) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trainer().fit(PretrainModule(str(tmp_path / "nowhere")), FixedBatches([random_batch([9])]))
