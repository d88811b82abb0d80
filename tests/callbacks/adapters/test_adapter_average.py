"""The average of what trains: against a loop, under every strategy, over resumes, and what it leaves alone."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mixcn.callbacks import AdapterAverage, AdapterCheckpoint, ExpertLoadMonitor, StepCheckpoint
from lightning_mixcn.model.sharding import full_tensor
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed
from tests.modules import strategy_run

Make = Callable[..., Any]
DECAY = 0.7


class Trace(Callback):
    """Keeps what trains after each step, whole, and what was logged."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        trained = [(name, value) for name, value in pl_module.named_parameters() if value.requires_grad]
        self.values.append({name: full_tensor(value).clone() for name, value in trained})

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def by_a_loop(values: list[dict[str, Tensor]], decay: float | None) -> dict[str, Tensor]:
    """Return the average in float64."""
    averages = {name: value.double() for name, value in values[0].items()}
    for number, present in enumerate(values[1:], 1):
        for name, value in present.items():
            weight = 1 / (number + 1) if decay is None else 1 - decay
            averages[name] = (1 - weight) * averages[name] + weight * value.double()
    return averages


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = torch.linalg.norm(found[name].double() - value.double())
        assert error <= tolerance * torch.linalg.norm(value.double()), name


@pytest.mark.parametrize(("decay", "start"), [(DECAY, 1), (DECAY, 3), (None, 1), (None, 3)])
def test_it_is_what_a_loop_computes(
    decay: float | None, start: int, module: PretrainModule, trainer: Make, tmp_path: Path
) -> None:
    trace, average = Trace(), AdapterAverage(decay, start)
    batches = [random_batch([20], seed=number) for number in range(12)]
    module.make_optimizer = partial(torch.optim.AdamW, lr=0.02)
    trainer(max_steps=6, accumulate_grad_batches=2, callbacks=[average, trace]).fit(module, FixedBatches(batches))
    assert len(trace.values) == 6
    expected = by_a_loop(trace.values[start - 1 :], decay)
    state = average.state_dict()
    assert state["steps"] == 7 - start
    assert_near(state["averages"], expected)
    moved = [name for name in expected if not torch.allclose(expected[name].float(), trace.values[-1][name], rtol=1e-3)]
    assert moved
    # The model still has its own values, and the folder has the average's.
    last = dict(module.named_parameters())
    assert all(torch.equal(last[name], value) for name, value in trace.values[-1].items())
    written = PretrainModule(module.base, dtype="float32", lora=module.lora, adapter=str(tmp_path / "adapter_average"))
    written.configure_model()
    assert_near({name: value for name, value in written.named_parameters() if value.requires_grad}, expected)


def test_the_run_is_what_it_is_without_and_the_average_is_validated(
    module: PretrainModule, trainer: Make, tiny_base: Path, tmp_path: Path
) -> None:
    batches = [random_batch([20, 9], seed=number, sources=2) for number in range(4)]
    runs = []
    for added in ([], [AdapterAverage(DECAY)]):
        trace = Trace()
        own = strategy_run.module(str(tiny_base), lora=strategy_run.lora(lora_dropout=0.3))
        fit = trainer(
            max_steps=4, limit_val_batches=2, val_check_interval=2, num_sanity_val_steps=1,
            default_root_dir=tmp_path / str(len(added)), callbacks=[ExpertLoadMonitor(), *added, trace],
        )  # fmt: skip
        fit.fit(own, FixedBatches(batches, ["zh", "en"]))
        runs.append((trace, (tmp_path / str(len(added)) / "experts.csv").read_text(encoding="utf-8"), own))
    (plain, experts, _), (averaged, same_experts, own) = runs
    assert experts == same_experts
    for one, other in zip(plain.values, averaged.values, strict=True):
        assert all(torch.equal(other[name], value) for name, value in one.items())
    tags = {
        f"val_average/{source}/{metric}"
        for source in ("zh", "en")
        for metric in ("bits_per_byte", "nll_nats_per_token")
    } | {"val_average/bits_per_byte"}
    for told, more in zip(plain.logged, averaged.logged, strict=True):
        assert more.keys() - told.keys() == tags
        assert {name: more[name] for name in told} == told
    # The average of all four steps, evaluated on its own.
    values = by_a_loop(averaged.values, DECAY)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    last = Trace()
    check = trainer(limit_val_batches=2, callbacks=[last])
    (found,) = check.validate(own, FixedBatches(batches, ["zh", "en"]), verbose=False)
    for name, value in found.items():
        assert averaged.logged[-1][name.replace("val/", "val_average/")] == pytest.approx(value, rel=1e-5)
        assert averaged.logged[-1][name] != pytest.approx(value, rel=1e-5)


def averaged_run(
    name: str, base: str, out: str, path: str, *, max_steps: int, saves: bool = False, ckpt_path: str | None = None
) -> dict[str, Any]:
    """Train on a text, validating, as each of the ranks. Returns: the average, and the trace."""
    ranks, trace, average = torch.distributed.get_world_size(), Trace(), AdapterAverage(DECAY)
    saving = [StepCheckpoint(every_n_steps=2, keep=9, dirpath=f"{out}/checkpoints")] if saves else []
    run = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy_run.strategy(name), max_steps=max_steps, max_epochs=-1,
        accumulate_grad_batches=strategy_run.MICRO_BATCHES // ranks, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=out,
        enable_checkpointing=saves, callbacks=[average, trace, AdapterCheckpoint(), *saving],
    )  # fmt: skip
    run.fit(strategy_run.module(base), strategy_run.text(base, path), ckpt_path=ckpt_path)
    return {"average": average.state_dict(), "values": trace.values}


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{row} " * (row % 17)}) for row in range(900)), encoding="utf-8")
    return str(file)


@pytest.mark.multiprocess
@pytest.mark.parametrize("saved", [pytest.param("fsdp2", marks=pytest.mark.slow), "ddp", "one file"])
def test_resuming_on_another_number_of_ranks(saved: str, text: str, tmp_path: Path, tiny_base: Path) -> None:
    base, out = str(tiny_base), str(tmp_path / "out")
    first = run_distributed(partial(averaged_run, max_steps=2, saves=True), 2, saved, base, out, text)
    for of_rank in first:
        assert_near(of_rank["average"]["averages"], by_a_loop(of_rank["values"], DECAY))
    resume = partial(averaged_run, max_steps=4, ckpt_path=f"{out}/checkpoints/step=00000002.ckpt")
    reader = "fsdp2" if saved == "fsdp2" else "one"
    (resumed,) = run_distributed(resume, 1, reader, base, f"{out}2", text)
    expected = by_a_loop([*first[0]["values"], *resumed["values"]], DECAY)
    assert resumed["average"]["steps"] == 4
    assert_near(resumed["average"]["averages"], expected)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_sharded_ranks_average_as_one_process(text: str, tmp_path: Path, tiny_base: Path) -> None:
    run: Any = partial(averaged_run, max_steps=3)
    (one,) = run_distributed(run, 1, "one", str(tiny_base), str(tmp_path / "one"), text)
    for of_rank in run_distributed(run, 4, "fsdp2", str(tiny_base), str(tmp_path / "four"), text):
        assert_near(of_rank["average"]["averages"], one["average"]["averages"], tolerance=1e-4)
        assert_near(of_rank["average"]["averages"], by_a_loop(of_rank["values"], DECAY))


def test_an_average_that_is_resumed_goes_on_bit_for_bit(module: PretrainModule, trainer: Make, tmp_path: Path) -> None:
    """Also from a checkpoint before its start."""
    first = AdapterAverage(DECAY, 2)
    first.load_state_dict({"steps": 0, "measured": {}, "averages": {}})
    trainer(max_steps=1, callbacks=[first]).fit(module, FixedBatches([random_batch([20])]))
    assert first.state_dict() == {"steps": 0, "measured": {}, "averages": {}}
    assert not (tmp_path / "adapter_average").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decay": 1.0}, "`decay=1.0`: expected less than 1"),
        ({"decay": 0.0}, "`decay=0.0`: expected more than 0"),
        ({"start": 0}, "`start=0`: expected at least 1"),
        ({"folder": "a/b"}, "`folder='a/b'`: expected a plain name"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterAverage(**given)


def test_a_broken_state_is_refused(module: PretrainModule, trainer: Make) -> None:
    average = AdapterAverage()
    average.load_state_dict({"steps": 1, "measured": {}, "averages": {"strange": torch.zeros(2)}})
    with pytest.raises(ValueError, match=r"The checkpoint's state of AdapterAverage: .* is missing"):
        trainer(callbacks=[average]).fit(module, FixedBatches([random_batch([20])] * 2))
