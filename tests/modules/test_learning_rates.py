"""Learning rates by part: each tensor has its own, in every family, and after resuming, on other ranks too."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, lr_scheduler

from lightning_mixcn.callbacks import StepCheckpoint
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.modules.learning_rates import make_rated_optimizer, make_rated_schedule, stand_in_names
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed, save_tiny_model
from tests.modules import strategy_run

Make = Callable[..., Any]
GIVEN: dict[str, float] = {"embeddings": 0.1, "lora_B": 16, "router": 0.5}
# What that means for a tensor, by words in its name, each pair the last of the first that matches.
EXPECTED = {
    ("embed_tokens",): 0.1,
    ("lm_head",): 0.1,
    (".gate.", "lora_A"): 0.5,
    (".gate.", "lora_B"): 8.0,
    ("self_attn", "lora_A"): 1.0,
    ("self_attn", "lora_B"): 16.0,
    ("experts", "lora_A"): 1.0,
    ("experts", "lora_B"): 16.0,
}
NAMES = [
    "embeddings",
    *(f"{place}.{factor}" for place in ("attention", "router", "experts") for factor in ("lora_A", "lora_B")),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def expected(name: str) -> float:
    (multiplier,) = [value for words, value in EXPECTED.items() if all(word in name for word in words)]
    return multiplier


def constant(optimizer: Any) -> Any:
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.fixture
def fit(tiny_base: Path, lora: Make, trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Make:
    def fit(steps: int, *, resume: bool = False, callbacks: tuple[Callback, ...] = (), **settings: Any) -> Any:
        """Run to a step, with a checkpoint after each. Returns: the trainer."""
        made = {"lora": lora(), "dtype": "float32", "train_embeddings": True, "learning_rates": GIVEN}
        made |= {"optimizer": partial(AdamW, lr=1e-3), "lr_scheduler": constant, "base": str(tiny_base)}
        saving = StepCheckpoint(every_n_steps=1, dirpath=str(tmp_path / "checkpoints"))
        run = trainer(max_steps=steps, max_epochs=-1, enable_checkpointing=True, callbacks=[saving, *callbacks])
        path = str(tmp_path / "checkpoints/last.ckpt") if resume else None
        caplog.clear()
        with caplog.at_level("INFO"):
            run.fit(PretrainModule(**(made | settings)), FixedBatches([random_batch([20, 9])]), ckpt_path=path)
        run.said = [record.getMessage() for record in caplog.records if "resume at" in record.getMessage()]
        return run

    return fit


def rates(run: Any) -> dict[str, float]:
    return strategy_run.rates(run.lightning_module, run)


def ends(run: Any) -> list[Tensor]:
    """Return all that a run ends with."""
    states = run.optimizers[0].state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return [*run.lightning_module.state_dict().values(), *tensors]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_every_tensor_has_its_rate_in_every_family(family: str, fit: Make, lora: Make, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "family", family)
    run = fit(1, base=str(base), lora=lora(target_modules="all-linear"))
    found = rates(run)
    assert len(found) > 20
    assert found == pytest.approx({name: 1e-3 * expected(name) for name in found})
    assert [group["name"] for group in run.optimizers[0].param_groups] == NAMES


def test_the_first_update_is_the_rate_times_the_gradient(fit: Make) -> None:
    """By SGD, from the same start: an update is its multiplier times that of a run without."""
    starts: list[dict[str, Tensor]] = []

    class Start(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    updates = []
    for given in (None, GIVEN):
        run = fit(1, learning_rates=given, optimizer=partial(SGD, lr=0.5), callbacks=(Start(),))
        after = run.lightning_module.state_dict()
        updates.append({name: after[name] - starts[-1][name] for name in after})
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert sum(bool(update.any()) for update in updates[0].values()) > 10
    for name, update in updates[1].items():
        # Differences of float32 numbers near 1.
        torch.testing.assert_close(update, expected(name) * updates[0][name], rtol=1e-4, atol=5e-7)


def test_without_it_there_is_one_group_without_a_name(fit: Make) -> None:
    run = fit(1, learning_rates=None)
    (group,) = run.optimizers[0].param_groups
    assert "name" not in group
    module = run.lightning_module
    assert group["params"] == [parameter for parameter in module.parameters() if parameter.requires_grad]


def test_loraplus_is_one_line(fit: Make) -> None:
    found = rates(fit(1, learning_rates={"lora_B": 16}))
    assert {value for name, value in found.items() if "lora_B" in name} == {0.016}
    assert {value for name, value in found.items() if "lora_B" not in name} == {1e-3}


@pytest.mark.parametrize("make", [AdamW, partial(AdamW, fused=True), partial(AdamW8bit, min_8bit_size=1)])
def test_a_resumed_run_goes_on_exactly(make: Make, fit: Make) -> None:
    optimizer = partial(make, lr=1e-3)
    fit(2, optimizer=optimizer)
    resumed = fit(4, resume=True, optimizer=optimizer)
    assert resumed.said == []
    whole = fit(4, optimizer=optimizer)
    assert rates(resumed) == rates(whole)
    assert all(torch.equal(one, other) for one, other in zip(ends(resumed), ends(whole), strict=True))


def test_other_multipliers_are_taken_and_said(fit: Make) -> None:
    fit(1)
    run = fit(2, resume=True, learning_rates={"embeddings": 0.1, "lora_B": 8, "router": 0.5})
    found = rates(run)
    assert {name: found[name] / 1e-3 for name in found} == pytest.approx(
        {name: expected(name) / (2 if "lora_B" in name else 1) for name in found}
    )
    (line,) = run.said
    assert "lr of attention.lora_B 0.016 → 0.008, lr of router.lora_B 0.008 → 0.004" in line
    assert "embeddings" not in line
    assert "lora_A" not in line


@pytest.mark.parametrize(("before", "after"), [(None, GIVEN), (GIVEN, None)])
def test_it_does_not_come_or_go_in_a_run(before: Any, after: Any, fit: Make) -> None:
    fit(1, learning_rates=before)
    with pytest.raises(ValueError, match=r"has [17] parameter groups, here it has [17]\..*learning_rates.*both runs"):
        fit(2, resume=True, learning_rates=after)


@pytest.mark.multiprocess
@pytest.mark.parametrize("saved", ["fsdp2", "ddp", "one file"])
def test_resuming_on_another_number_of_ranks(saved: str, tmp_path: Path, tiny_base: Path) -> None:
    """Saved on two ranks, resumed on one and, where that is sharded, on two again with other multipliers."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{row} " * (row % 17)}) for row in range(900)), encoding="utf-8")
    common, folder = (str(tiny_base), str(tmp_path / "out")), str(tmp_path / "checkpoints")
    train: Any = partial(strategy_run.train, learning_rates=GIVEN, train_embeddings=True, path=str(text))
    (whole,) = run_distributed(partial(train, max_steps=4), 1, ["one"], *common)
    first = run_distributed(partial(train, max_steps=2, checkpoints=folder), 2, [saved], *common)
    resume = partial(train, max_steps=4, ckpt_path=f"{folder}/step=00000002.ckpt")
    runs = [*(of_rank[saved] for of_rank in first)]
    readers = ["fsdp2"] if saved == "fsdp2" else ["one", "fsdp2"]
    (resumed,) = run_distributed(resume, 1, readers, *common)
    for reader in readers:
        # The loss of the last step follows an update: each moment is its own tensor's, whatever the order of groups.
        assert resumed[reader]["losses"] == pytest.approx(whole["one"]["losses"][2:], rel=1e-5)
        for name, value in whole["one"]["adapter"].items():
            error = torch.linalg.norm(resumed[reader]["adapter"][name] - value)
            assert error <= 1e-5 * torch.linalg.norm(value), name
        runs.append(resumed[reader])
    for run in runs:
        assert run["rates"] == pytest.approx({name: 3e-3 * expected(name) for name in whole["one"]["rates"]})
    changed = run_distributed(partial(resume, learning_rates={"lora_B": 4.0}), 2, ["fsdp2"], *common)
    for of_rank in changed:
        found = of_rank["fsdp2"]["rates"]
        assert found == pytest.approx({name: 3e-3 * (4 if "lora_B" in name else 1) for name in found})
    if saved == "fsdp2":
        with pytest.raises(RuntimeError, match="has 7 parameter groups, here it has 1"):
            run_distributed(partial(resume, learning_rates=None), 2, ["fsdp2"], *common)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"`learning_rates=\{\}`: expected a multiplier of at least one part"),
        ({"lora_b": 16}, r"'lora_b'.*: expected one of embeddings, attention, router, experts, lora_A, lora_B"),
        ({"lora_B": 0}, r"`learning_rates\['lora_B'\]=0`: expected more than 0"),
        ({"lora_B": float("nan")}, r"\['lora_B'\]=nan`: expected a finite number"),
        ({"lora_B": 1e4}, r"\['lora_B'\]=10000\.0`: expected at most 1000"),
        ({"embeddings": 0.1}, r"`learning_rates` has embeddings, which do not train\. Set `train_embeddings: true`"),
        ([0.1], r"`learning_rates=\[0\.1\]`: expected null or a mapping|expected a mapping"),
    ],
)
def test_values_are_checked_before_anything_is_loaded(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainModule("nowhere", learning_rates=given)


def test_a_multiplier_of_nothing_is_refused(fit: Make, lora: Make) -> None:
    with pytest.raises(ValueError, match=r"router trains nothing here.*what trains is embeddings, attention\.lora_A"):
        fit(1, lora=lora(target_modules=["q_proj", "w1"]))


def trained() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(1, 1))) for name in stand_in_names()]


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (LBFGS, {"lora_B": 2}, "`model.init_args.optimizer` cannot be made: LBFGS"),
        (
            lambda groups: AdamW([p for group in groups for p in group["params"]]),
            {"lora_B": 2},
            "AdamW keeps no groups",
        ),
        (partial(AdamW, lr=1.0), {"lora_B": 100, "experts": 100}, r"experts\.lora_B would train at 10000, expected at"),
    ],
)
def test_optimizers_that_cannot_do_so_are_refused(make: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rated_optimizer(make, trained(), given)


def test_a_rate_that_is_a_tensor_is_multiplied_once() -> None:
    rate = torch.tensor(1e-3)
    optimizer = make_rated_optimizer(partial(AdamW, lr=rate, foreach=False), trained(), {"lora_B": 16})
    found = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
    assert found == pytest.approx({name: 0.016 if "lora_B" in name else 1e-3 for name in found})


def test_a_schedule_with_a_peak_of_its_own_is_refused() -> None:
    cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10)
    optimizer = make_rated_optimizer(AdamW, trained(), {"lora_B": 16})
    with pytest.raises(ValueError, match="OneCycleLR sets learning rates of its own"):
        make_rated_schedule(cycle, optimizer, {"lora_B": 16})
    make_rated_schedule(cycle, make_rated_optimizer(AdamW, trained(), None), None)
