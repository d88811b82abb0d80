"""Resuming with another configuration: what is taken from it, said and refused, against torch's own classes."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, AdamW, Optimizer, RMSprop, lr_scheduler

from lightning_mixcn.modules import PretrainModule, WarmupCosine, WarmupStableDecay
from lightning_mixcn.modules.resume import ConfiguredOptimization, settings_changes
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed
from tests.modules import strategy_run

Make = Callable[..., Any]
STEPS = 3

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"),
    # SequentialLR's parts say so of each other in torch itself.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before:UserWarning"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step\\(\\)`:UserWarning"),
]


class Runs:
    """Runs of one folder: one that saves, and others that go on from there."""

    def __init__(self, folder: Path, base: Path, lora: Make, trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
        self.folder, self.base, self.lora, self.trainer, self.caplog = folder, base, lora, trainer, caplog

    def fit(self, steps: int, *, resume: bool, callbacks: tuple[Any, ...] = (), **settings: Any) -> Any:
        """Run to a step. Returns: the trainer."""
        lora = settings.pop("lora", None) or self.lora()
        trainer_settings = settings.pop("trainer", {})
        module = PretrainModule(str(self.base), **({"lora": lora, "dtype": "float32"} | settings))
        saving = [] if resume else [ModelCheckpoint(self.folder, every_n_train_steps=STEPS, filename="{step}")]
        run = self.trainer(
            max_steps=steps, enable_checkpointing=not resume, callbacks=[*saving, *callbacks], **trainer_settings
        )
        path = self.folder / f"step={STEPS}.ckpt" if resume else None
        self.caplog.clear()
        with self.caplog.at_level(logging.INFO):
            run.fit(module, FixedBatches([random_batch([20, 9])] * 8), ckpt_path=path, weights_only=True)
        return run

    @property
    def said(self) -> list[str]:
        """Lines about what was taken from the configuration."""
        return [record.getMessage() for record in self.caplog.records if "resume at" in record.getMessage()]


@pytest.fixture
def runs(tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make, caplog: pytest.LogCaptureFixture) -> Runs:
    return Runs(tmp_path, tiny_base, lora, trainer, caplog)


def constant(optimizer: Optimizer) -> Any:
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (AdamW, {"lr": 1e-3}, {"lr": 1e-5, "weight_decay": 0.5, "betas": (0.8, 0.95), "eps": 1e-6}),
        (AdamW, {"lr": 1e-3, "amsgrad": True}, {"lr": 1e-3, "amsgrad": False, "maximize": True}),
        (AdamW, {"lr": 1e-3, "foreach": False}, {"lr": 1e-3, "fused": True}),
        (SGD, {"lr": 1e-2, "momentum": 0.9}, {"lr": 1e-3, "momentum": 0.5, "nesterov": True}),
        (SGD, {"lr": 1e-2}, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1}),
        (RMSprop, {"lr": 1e-3}, {"lr": 1e-4, "alpha": 0.9, "weight_decay": 0.1}),
        (Adagrad, {"lr": 1e-3}, {"lr": 1e-4, "lr_decay": 0.1}),
        (Adafactor, {"lr": 1e-3}, {"lr": 1e-4, "beta2_decay": -0.5, "d": 2.0, "weight_decay": 0.1}),
        (partial(AdamW8bit, min_8bit_size=1), {"lr": 1e-3}, {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    ],
)
def test_the_optimizer_s_settings_are_the_configuration_s(
    make: Any, before: dict[str, Any], after: dict[str, Any], runs: Runs
) -> None:
    runs.fit(STEPS, resume=False, optimizer=partial(make, **before), lr_scheduler=constant)
    run = runs.fit(STEPS + 1, resume=True, optimizer=partial(make, **after), lr_scheduler=constant)
    (group,) = run.optimizers[0].param_groups
    expected = make([nn.Parameter(torch.zeros(1))], **after).param_groups[0]
    assert {key: group[key] for key in expected if key != "params"} == {
        key: value for key, value in expected.items() if key != "params"
    }
    (line,) = runs.said
    was = make([nn.Parameter(torch.zeros(1))], **before).param_groups[0]
    for key, value in expected.items():
        if key != "params" and value != was[key]:
            assert f"{key} " in line
    assert "→" in line


def test_an_unchanged_configuration_is_not_mentioned(runs: Runs) -> None:
    settings: dict[str, Any] = {"optimizer": partial(AdamW, lr=1e-3), "lr_scheduler": constant}
    runs.fit(STEPS, resume=False, **settings)
    runs.fit(STEPS + 1, resume=True, **settings)
    assert runs.said == []


def stepped(optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: 0.0)
    return optimizer


@pytest.mark.parametrize(
    "make", [Adafactor, LBFGS, lambda parameters: SGD([[*parameters][i] for i in (0, 2)], momentum=0.9)]
)
def test_states_that_cannot_be_compared_are_let_through(make: Any) -> None:
    """Adafactor has other parts for one dimension, LBFGS wants a closure, a function more parameters than one."""
    optimizer = stepped(make([nn.Parameter(torch.ones(3)) for _ in range(3)][: 1 if make is LBFGS else 3]))
    ConfiguredOptimization(optimizer, constant, make).check_states(optimizer)


def test_an_optimizer_of_a_part_of_what_trains_goes_on(runs: Runs) -> None:
    def of_half(parameters: Any, lr: float) -> Optimizer:
        first, _, *others = parameters
        return AdamW([first, *others[::2]], lr=lr)

    for resume, lr in ((False, 1e-3), (True, 1e-4)):
        run = runs.fit(STEPS + resume, resume=resume, optimizer=partial(of_half, lr=lr), lr_scheduler=constant)
    assert run.global_step == STEPS + 1


class Estimating(SGD):
    """Keeps an estimate `d` and a count `k` in its parameter groups, as Prodigy, D-Adaptation and ScheduleFree do.

    Like D-Adaptation's SGD it makes its states at k = 0 only.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, d0: float = 1e-6) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.param_groups[0] |= {"d0": d0, "d": d0, "k": 0, "train_mode": False}
        self.param_groups[0]["growth_rate"] = float("inf")  # their default

    def train(self) -> None:
        """Switch to training, as ScheduleFree asks for."""
        self.param_groups[0]["train_mode"] = True

    def step(self, closure: Any = None) -> Any:
        """Step, and double the estimate."""
        (group,) = self.param_groups
        for parameter in group["params"]:
            if group["k"] == 0:
                self.state[parameter]["start"] = parameter.detach().clone()
            if parameter.grad is not None:
                self.state[parameter]["start"]  # KeyError where it was not made
        group["k"] += 1
        group["d"] *= 2
        return super().step(closure)


@pytest.mark.parametrize("changes", [{}, {"lr": 1e-4}, {"weight_decay": 0.1}, {"d0": 1e-3}])
def test_progress_that_an_optimizer_keeps_in_its_groups_goes_on(changes: dict[str, Any], runs: Runs) -> None:
    runs.fit(STEPS, resume=False, optimizer=partial(Estimating, lr=1e-3), lr_scheduler=constant)
    run = runs.fit(
        STEPS + 1, resume=True, optimizer=partial(Estimating, **({"lr": 1e-3} | changes)), lr_scheduler=constant
    )
    (group,) = run.optimizers[0].param_groups
    assert group["k"] == STEPS + 1
    # Another configured start is a configured value like any other.
    assert group["d"] == (1e-3 * 2 if "d0" in changes else 1e-6 * 2 ** (STEPS + 1))
    assert (group["lr"], group["weight_decay"]) == (changes.get("lr", 1e-3), changes.get("weight_decay", 0.0))
    assert len(runs.said) == bool(changes)
    assert all(f"{key} " in runs.said[0] for key in changes)
    assert not any(" k " in line for line in runs.said)


def test_an_older_checkpoint_without_configured_groups_is_read(runs: Runs) -> None:
    runs.fit(STEPS, resume=False, optimizer=partial(AdamW, lr=1e-3), lr_scheduler=constant)
    path = runs.folder / f"step={STEPS}.ckpt"
    content = torch.load(path, weights_only=True)
    del content["mixcn_settings"]["groups"], content["mixcn_settings"]["lr_scheduler_parts"]
    torch.save(content, path)
    runs.fit(STEPS + 1, resume=True, optimizer=partial(AdamW, lr=1e-3, weight_decay=0.5), lr_scheduler=constant)
    assert runs.said == ["resume at optimizer step 3: weight_decay 0.01 → 0.5"]


def test_states_that_a_setting_needs_and_that_are_not_there_are_refused(runs: Runs) -> None:
    runs.fit(STEPS, resume=False, optimizer=partial(AdamW, lr=1e-3))
    with pytest.raises(ValueError, match=r"torch.AdamW do not allow amsgrad False → True.*Set `model.init_args.opt"):
        runs.fit(STEPS + 1, resume=True, optimizer=partial(AdamW, lr=1e-3, amsgrad=True))


def test_another_optimizer_is_refused(runs: Runs) -> None:
    runs.fit(STEPS, resume=False, optimizer=partial(AdamW, lr=1e-3))
    with pytest.raises(ValueError, match=r"the states of torch.AdamW, but `optimizer` is torch.SGD"):
        runs.fit(STEPS + 1, resume=True, optimizer=partial(SGD, lr=1e-3))


SCHEDULES: dict[str, tuple[Any, Any]] = {
    "warmup": (partial(WarmupCosine, total_steps=10), partial(WarmupCosine, total_steps=20, warmup_fraction=0.5)),
    "cosine": (partial(lr_scheduler.CosineAnnealingLR, T_max=10), partial(lr_scheduler.CosineAnnealingLR, T_max=20)),
    "steps": (partial(lr_scheduler.StepLR, step_size=2), partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)),
    "lambda": (
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step),
    ),
    "cycle": (
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10),
        partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=20),
    ),
    "multi": (
        partial(lr_scheduler.MultiStepLR, milestones=[2, 9]),
        partial(lr_scheduler.MultiStepLR, milestones=[1, 2], gamma=0.3),
    ),
    "parts": (
        lambda of: lr_scheduler.SequentialLR(
            of, [lr_scheduler.LinearLR(of, 0.1, total_iters=2), lr_scheduler.ExponentialLR(of, 0.9)], [2]
        ),
        lambda of: lr_scheduler.SequentialLR(
            of, [lr_scheduler.LinearLR(of, 0.2, total_iters=4), lr_scheduler.ExponentialLR(of, 0.5)], [4]
        ),
    ),
    "chain": (
        lambda of: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(of, 0.9), lr_scheduler.ConstantLR(of, 0.1, 4)], optimizer=of
        ),
        lambda of: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(of, 0.8), lr_scheduler.ConstantLR(of, 0.1, 4)], optimizer=of
        ),
    ),
}


def curve(make: Any, rate: float, steps: int) -> list[float]:
    """Learning rates of a run that was never interrupted."""
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=rate)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


class Rates(EarlyStopping):
    """Keeps the learning rate of each step; a callback with a state, too."""

    def __init__(self, patience: int = 9, monitor: str = "train/loss") -> None:
        super().__init__(monitor, patience=patience)
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rate", [1e-3, 5e-4])
def test_a_schedule_goes_on_as_it_is_configured(name: str, rate: float, runs: Runs) -> None:
    first, second = SCHEDULES[name]
    runs.fit(STEPS, resume=False, optimizer=partial(AdamW, lr=1e-3), lr_scheduler=first)
    for make in (first, second):
        watch = Rates()
        runs.fit(STEPS + 4, resume=True, callbacks=(watch,), optimizer=partial(AdamW, lr=rate), lr_scheduler=make)
        assert watch.rates == pytest.approx(curve(make, rate, STEPS + 4)[STEPS:], rel=1e-9)
        # OneCycleLR has its own peak, whatever the optimizer says.
        differs = curve(make, rate, STEPS + 1)[STEPS] != pytest.approx(curve(first, 1e-3, STEPS + 1)[STEPS])
        assert len(runs.said) == int(differs or make is second)
        if differs:
            assert f"learning rate of step {STEPS} " in runs.said[0]


def test_a_longer_cosine_says_how_its_curve_changes(runs: Runs) -> None:
    optimizer = partial(AdamW, lr=1e-3)
    runs.fit(STEPS, resume=False, optimizer=optimizer, lr_scheduler=partial(WarmupCosine, warmup_fraction=0.0))
    runs.fit(6, resume=True, optimizer=optimizer, lr_scheduler=partial(WarmupCosine, warmup_fraction=0.0))
    # At the end of 3 steps 0.1 of the peak, in the middle of 6 (1 + 0.1) / 2.
    assert runs.said == ["resume at optimizer step 3: learning rate of step 3 0.0001 → 0.00055, total_steps 3 → 6"]


def cosine_after_warmup(of: Optimizer, *, warmup: int = 2, length: int = 10) -> Any:
    parts = [lr_scheduler.LinearLR(of, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(of, T_max=length)]
    return lr_scheduler.SequentialLR(of, parts, [warmup])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warmup": 5}, "milestones [2] → [5]"),
        ({"length": 20}, "schedulers[1].T_max 10 → 20"),
    ],
)
def test_changes_inside_a_sequence_are_said(changes: dict[str, Any], said: str, runs: Runs) -> None:
    optimizer = partial(AdamW, lr=1e-3)
    runs.fit(STEPS, resume=False, optimizer=optimizer, lr_scheduler=cosine_after_warmup)
    runs.fit(STEPS + 1, resume=True, optimizer=optimizer, lr_scheduler=partial(cosine_after_warmup, **changes))
    assert said in runs.said[0]


def test_another_anneal_strategy_is_said(runs: Runs) -> None:
    make = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10)
    runs.fit(STEPS, resume=False, lr_scheduler=make)
    runs.fit(STEPS + 1, resume=True, lr_scheduler=partial(make, anneal_strategy="linear"))
    assert "anneal_func_type cos → linear" in runs.said[0]


@pytest.mark.parametrize(
    "parts", [lambda of: [lr_scheduler.ExponentialLR(of, 0.9)], lambda of: [lr_scheduler.ConstantLR(of)] * 2]
)
def test_a_sequence_of_other_parts_is_another_schedule(parts: Any, runs: Runs) -> None:
    def other(of: Optimizer) -> Any:
        first = lr_scheduler.LinearLR(of, 0.1, total_iters=2)
        rest = parts(of)
        return lr_scheduler.SequentialLR(of, [first, *rest], list(range(2, 2 + len(rest))))

    runs.fit(STEPS, resume=False, optimizer=partial(AdamW, lr=1e-3), lr_scheduler=cosine_after_warmup)
    watch = Rates()
    runs.fit(STEPS + 2, resume=True, callbacks=(watch,), optimizer=partial(AdamW, lr=1e-3), lr_scheduler=other)
    assert watch.rates == pytest.approx(curve(other, 1e-3, STEPS + 2)[STEPS:])
    assert "SequentialLR(torch.LinearLR, torch.CosineAnnealingLR) → torch.SequentialLR(torch.LinearLR, " in runs.said[0]


def test_another_kind_of_schedule(runs: Runs) -> None:
    watch = Rates()
    runs.fit(STEPS, resume=False, optimizer=partial(AdamW, lr=1e-3), lr_scheduler=SCHEDULES["warmup"][0])
    parts = SCHEDULES["parts"][0]
    runs.fit(STEPS + 3, resume=True, callbacks=(watch,), optimizer=partial(AdamW, lr=1e-3), lr_scheduler=parts)
    assert watch.rates == pytest.approx(curve(parts, 1e-3, STEPS + 3)[STEPS:])
    assert (
        "lr_scheduler lightning_mixcn.WarmupCosine → torch.SequentialLR(torch.LinearLR, torch.ExponentialLR)"
        in runs.said[0]
    )


def test_a_schedule_that_has_ended_is_refused(runs: Runs) -> None:
    first = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10)
    runs.fit(STEPS, resume=False, lr_scheduler=first)
    with pytest.raises(ValueError, match=r"torch\.OneCycleLR ends before step 3, at which the run is resumed"):
        runs.fit(STEPS + 1, resume=True, lr_scheduler=partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=2))


PLATEAU = {"limit_val_batches": 1, "val_check_interval": 1}


def plateau(**changes: Any) -> Any:
    settings: dict[str, Any] = {"monitor": "val/zh/nll_nats_per_token", "factor": 0.5, "patience": 0}
    settings |= {"threshold": 99.0, "threshold_mode": "abs"}
    return partial(ReduceLROnPlateau, **(settings | changes))


def test_a_schedule_that_follows_a_value_is_stepped_after_each_validation(runs: Runs) -> None:
    """With a threshold that nothing meets, the rate is halved by the second and each further validation."""
    watch = Rates()
    runs.fit(4, resume=False, callbacks=(watch,), optimizer=partial(AdamW, lr=1e-3), lr_scheduler=plateau(),
             trainer=PLATEAU)  # fmt: skip
    assert watch.rates == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])


def test_a_schedule_that_would_miss_validations_is_refused(runs: Runs) -> None:
    """Lightning steps it only where an optimizer step ends."""
    for accumulate, interval in ((2, 3), (4, 2)):
        settings = {"limit_val_batches": 1, "accumulate_grad_batches": accumulate, "val_check_interval": interval}
        with pytest.raises(ValueError, match=rf"`trainer.val_check_interval={interval}`.* multiple of.*e\.g\. 4$"):
            runs.fit(2, resume=False, lr_scheduler=plateau(), trainer=settings)


@pytest.mark.parametrize(
    ("rate", "changes", "expected", "said"),
    [
        (1e-3, {}, 5e-4, None),
        (4e-4, {}, 4e-4, "lr 0.0005 → 0.0004"),
        (1e-3, {"factor": 0.1, "patience": 5}, 5e-4, "factor 0.5 → 0.1, patience 0 → 5"),
        (1e-3, {"monitor": "train/loss"}, 5e-4, "monitor val/zh/nll_nats_per_token → train/loss"),
    ],
)
def test_a_plateau_resumed(rate: float, changes: dict[str, Any], expected: float, said: str | None, runs: Runs) -> None:
    first, watch = partial(AdamW, lr=1e-3), Rates()
    runs.fit(STEPS, resume=False, optimizer=first, lr_scheduler=plateau(), trainer=PLATEAU)
    run = runs.fit(
        STEPS + 1, resume=True, callbacks=(watch,), optimizer=partial(AdamW, lr=rate), lr_scheduler=plateau(**changes),
        trainer=PLATEAU,
    )  # fmt: skip
    assert watch.rates == pytest.approx([expected])
    assert runs.said == [line for line in runs.said if said is not None and said in line]
    assert len(runs.said) == int(said is not None)
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert (scheduler.factor, scheduler.patience) == (changes.get("factor", 0.5), changes.get("patience", 0))
    if "monitor" in changes:
        assert scheduler.best == pytest.approx(float(run.callback_metrics["train/loss"]))


def test_other_arguments_are_taken_and_said(runs: Runs) -> None:
    runs.fit(STEPS, resume=False, callbacks=(Rates(patience=9),))
    watch = Rates(patience=3)
    run = runs.fit(STEPS + 1, resume=True, callbacks=(watch,), router_aux_loss_coef=0.5, seed=7, dtype="bfloat16")
    assert (run.lightning_module.router_aux_loss_coef, watch.patience) == (0.5, 3)
    for part in ("router_aux_loss_coef 0.02 → 0.5", "seed 0 → 7", "dtype float32 → bfloat16", "of EarlyStopping 9 → 3"):
        assert part in runs.said[0]


def test_a_callback_with_another_monitor_begins_again(runs: Runs) -> None:
    runs.fit(STEPS, resume=False, callbacks=(Rates(),))
    watch = Rates(monitor="train/nll_nats_per_token")
    runs.fit(STEPS + 1, resume=True, callbacks=(watch,))
    assert "'monitor': 'train/loss'" in runs.said[0]
    assert "begins again" in runs.said[0]


def test_another_quantization_is_refused(runs: Runs) -> None:
    runs.fit(STEPS, resume=False, quantization="nf4")
    with pytest.raises(ValueError, match="trained with `quantization: nf4`, but it is none here"):
        runs.fit(STEPS + 1, resume=True, quantization="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_alpha": 80},
            "the rank 4 and the scaling 2, here it has 4 and 20: `lora.lora_alpha` was 8 and is 80",
        ),
        ({"use_rslora": True}, "here it has 4 and 4: `lora.use_rslora` was False and is True"),
        ({"alpha_pattern": {"q_proj": 100}}, "`lora.alpha_pattern` was {} and is {'q_proj': 100}"),
        ({"rank_pattern": {"w1": 2}}, "has the rank 4 and the scaling 2, here it has 2 and 4: `lora.rank_pattern`"),
        ({"target_modules": ["q_proj", "v_proj"]}, "which has no adapter here: `lora.target_modules` was"),
        ({"layers_to_transform": [1]}, "which has no adapter here: `lora.layers_to_transform` was None and is"),
    ],
)
@pytest.mark.parametrize("has_record", [True, False])
def test_factors_that_would_mean_something_else_are_refused(
    changes: dict[str, Any], message: str, has_record: bool, runs: Runs, lora: Make
) -> None:
    """An older checkpoint, which has no record, is judged by the arguments that it holds."""
    runs.fit(STEPS, resume=False)
    path = runs.folder / f"step={STEPS}.ckpt"
    if not has_record:
        content = torch.load(path, weights_only=True)
        del content["mixcn_lora"], content["mixcn_settings"]
        torch.save(content, path)
        message = "mean something else: `lora|do not train here|checkpoint lacks"
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        runs.fit(STEPS + 1, resume=True, lora=lora(**changes))


@pytest.mark.parametrize("has_record", [True, False])
def test_another_dropout_is_taken_and_said(has_record: bool, runs: Runs, lora: Make) -> None:
    runs.fit(STEPS, resume=False, lr_scheduler=constant)
    path = runs.folder / f"step={STEPS}.ckpt"
    if not has_record:
        content = torch.load(path, weights_only=True)
        del content["mixcn_lora"]
        torch.save(content, path)
    runs.fit(STEPS + 1, resume=True, lora=lora(lora_dropout=0.25), lr_scheduler=constant)
    assert runs.said == ["resume at optimizer step 3: lora.lora_dropout 0 → 0.25"]


@pytest.mark.parametrize(
    ("saved", "present", "said"),
    [
        (None, {"a": 1}, ["x null → {'a': 1}"]),
        ({"a": 1}, None, ["x {'a': 1} → null"]),
        ({}, {"a": 1}, ["x {} → {'a': 1}"]),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["x.a.b 1 → 2"]),
        ({"a": 1}, {"a": 1, "b": 2}, ["x.b not set → 2"]),
        ({"a": 1, "b": 2}, {"a": 1}, ["x.b 2 → not set"]),
        (None, None, []),
    ],
)
def test_changes_of_nested_arguments(saved: Any, present: Any, said: list[str]) -> None:
    assert settings_changes({"x": saved}, {"x": present}) == said


def test_the_same_adapters_in_other_words_are_taken(runs: Runs, lora: Make) -> None:
    runs.fit(STEPS, resume=False)
    runs.fit(STEPS + 1, resume=True, lora=lora(target_modules="all-linear", alpha_pattern={"q_proj": 8}))


@pytest.mark.multiprocess
def test_under_fsdp2_and_ddp(tmp_path: Path, tiny_base: Path) -> None:
    """A sharded checkpoint is filled into model and optimizer while it is read."""
    for name in ("fsdp2", "ddp"):
        folder, common = str(tmp_path / name), ([name], str(tiny_base), str(tmp_path / "out"))
        first: Any = partial(strategy_run.train, checkpoints=folder, max_steps=5)
        run_distributed(first, 2, *common)
        resume = partial(strategy_run.train, ckpt_path=f"{folder}/step=00000005.ckpt", max_steps=6)
        settings: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
        for rank in run_distributed(partial(resume, optimizer=partial(AdamW, **settings)), 2, *common):
            found = rank[name]["settings"]
            assert {key: found[key] for key in settings} == settings
            assert found["initial_lr"] == 1e-5
        for changes, message in (
            ({"optimizer": partial(SGD, lr=1e-3)}, "the states of torch.AdamW, but `optimizer` is torch.SGD"),
            ({"lora": strategy_run.lora(lora_alpha=80)}, "here it has 4 and 20"),
            ({"lora": strategy_run.lora(r=2)}, "here it has 2 and 4"),
        ):
            with pytest.raises(RuntimeError, match=message):
                run_distributed(partial(resume, **changes), 2, *common)


@pytest.mark.multiprocess
def test_progress_in_groups_goes_on_from_a_sharded_checkpoint(tmp_path: Path, tiny_base: Path) -> None:
    folder, common = str(tmp_path / "saved"), (["fsdp2"], str(tiny_base), str(tmp_path / "out"))
    train: Any = partial(strategy_run.train, optimizer=Estimating)
    run_distributed(partial(train, checkpoints=folder, max_steps=5), 2, *common)
    for rank in run_distributed(partial(train, ckpt_path=f"{folder}/step=00000005.ckpt", max_steps=6), 2, *common):
        assert (rank["fsdp2"]["settings"]["k"], rank["fsdp2"]["settings"]["d"]) == (6, 1e-6 * 2**6)


class StopError(Exception):
    """Ends a run as a kill does: between two checkpoints, with nothing saved."""


class Stop(Callback):
    """Stops in a step.

    Args:
        step: Number of the optimizer step, from 0.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            raise StopError


def wsd_run(runs: Runs, steps: int, **settings: Any) -> tuple[Any, list[float]]:
    """Return what a run ends with, all of it, and the rate of each of its steps."""
    watch, lengths = Rates(), {"warmup": 2, "decay": 2, "decay_shape": "linear"}
    schedule = partial(WarmupStableDecay, **(lengths | settings.pop("lengths", {})))
    stops = settings.pop("stops", ())
    run = runs.fit(
        steps, callbacks=(watch, *stops), optimizer=partial(AdamW, lr=1e-3), lr_scheduler=schedule, **settings
    )
    states = [value for state in run.optimizers[0].state.values() for value in state.values()]
    return [*run.lightning_module.state_dict().values(), *states], watch.rates


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_run_that_is_extended_before_its_decay_is_one_planned_so(runs: Runs) -> None:
    """Planned with 7 steps, which would decay from the sixth; killed in the fifth, and resumed with 8."""
    with pytest.raises(StopError):
        wsd_run(runs, 7, resume=False, stops=(Stop(4),))
    extended, rest = wsd_run(runs, 8, resume=True)
    assert runs.said == ["resume at optimizer step 3: total_steps 7 → 8"]
    planned, rates = wsd_run(runs, 8, resume=False)
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, *[1e-3] * 5, 5e-4])
    assert rest == rates[STEPS:]
    assert all(torch.equal(one, other) for one, other in zip(planned, extended, strict=True))


@pytest.mark.parametrize(
    ("lengths", "before", "why"),
    [
        ({"warmup": 0.25}, 5, "the warm-up was another (give `warmup` in steps)"),
        ({"warmup": 1, "decay": 4}, 5, "the decay had begun"),
    ],
)
def test_a_run_that_is_extended_otherwise_says_so(lengths: Any, before: int, why: str, runs: Runs) -> None:
    wsd_run(runs, before, resume=False, lengths=lengths)
    wsd_run(runs, 8, resume=True, lengths=lengths)
    assert f"total_steps {before} → 8, unlike a run of 8 steps from the start: {why}" in runs.said[0]


def test_a_schedule_in_steps_allows_fast_dev_run(runs: Runs) -> None:
    trial: dict[str, Any] = {"fast_dev_run": 1}
    assert wsd_run(runs, 1, resume=False, trainer=trial)[1] == pytest.approx([1e-3 / 3])
