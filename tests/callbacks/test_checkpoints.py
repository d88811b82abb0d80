"""Checkpoints of steps and of signals, and runs that are killed anywhere."""

import json
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_mixcn.callbacks import PreemptionCheckpoint, StepCheckpoint
from lightning_mixcn.callbacks import checkpoints as step_checkpoint
from lightning_mixcn.errors import UserError
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.modules.checkpoints import check_before_loading, find_fault, publish, verify
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed

Make = Callable[..., Any]

pytestmark = [
    # The batches of these tests are no resumable stream; they are all alike.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    # Resuming into the same folder is the point here.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def names(folder: Path) -> list[str]:
    """Names of the checkpoints; each has its sums beside it, and nothing else is there."""
    found = {path.name for path in folder.iterdir()}
    checkpoints = {name for name in found if name.endswith(".ckpt")}
    assert found == checkpoints | {f"{name}.sha256" for name in checkpoints - {"last.ckpt"}}
    return sorted(checkpoints)


def fit(module: PretrainModule, trainer: Make, folder: Path, steps: int, resume: str | None = None) -> None:
    checkpoint = StepCheckpoint(every_n_steps=2, dirpath=str(folder))
    run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint], accumulate_grad_batches=2)
    run.fit(module, FixedBatches([random_batch([9])] * 20), ckpt_path=resume)


def test_the_newest_two_and_the_last_step(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    fit(module, trainer, tmp_path, steps=7)
    assert names(tmp_path) == ["last.ckpt", "step=00000006.ckpt", "step=00000007.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000007.ckpt"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ({"keep": 3}, {"keep": 1}, [7]),
        ({"keep": 3}, {"keep": 2, "every_n_steps": 3}, [6, 7]),
        ({"keep": 1}, {"keep": 9}, [5, 6, 7]),
        ({"keep": 2}, {"keep": 2, "every_n_steps": 1}, [6, 7]),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning")
def test_a_resumed_run_keeps_as_many_as_it_is_told_now(
    before: dict[str, int],
    after: dict[str, int],
    kept: list[int],
    tmp_path: Path,
    module: PretrainModule,
    trainer: Make,
) -> None:
    for steps, settings, resume in ((5, before, None), (7, after, str(tmp_path / "last.ckpt"))):
        checkpoint = StepCheckpoint(**({"every_n_steps": 2} | settings), dirpath=str(tmp_path))
        run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint])
        run.fit(module, FixedBatches([random_batch([9])] * 20), ckpt_path=resume)
    assert names(tmp_path) == ["last.ckpt", *(f"step={step:08d}.ckpt" for step in kept)]


def test_a_step_is_left_to_a_request(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    class Postpones(StepCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            if trainer.global_step in (2, 4):
                self.postpone()
            if trainer.global_step == 4:
                self.request()
            super().on_train_batch_end(trainer, *arguments)

    checkpoint = Postpones(every_n_steps=2, keep=9, dirpath=str(tmp_path))
    run = trainer(max_steps=7, enable_checkpointing=True, callbacks=[checkpoint])
    run.fit(module, FixedBatches([random_batch([9])] * 20))
    assert names(tmp_path) == ["last.ckpt", *(f"step=0000000{step}.ckpt" for step in (4, 6, 7))]


def test_a_resumed_run_does_not_save_amid_an_accumulation(
    tmp_path: Path, module: PretrainModule, trainer: Make
) -> None:
    fit(module, trainer, tmp_path, steps=4)
    again = PretrainModule(module.base, dtype="float32", lora=module.lora)
    fit(again, trainer, tmp_path, steps=6, resume="last")
    assert names(tmp_path) == ["last.ckpt", "step=00000004.ckpt", "step=00000006.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000006.ckpt"


def test_a_run_that_stops_keeps_its_last_good_checkpoint(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    class Broken(PretrainModule):
        def compute_loss(self, batch: Any, output: Any) -> Any:
            loss, count = super().compute_loss(batch, output)
            return loss * (float("nan") if self.trainer.global_step == 3 else 1.0), count

    broken = Broken(module.base, dtype="float32", lora=module.lora)
    with pytest.raises(FloatingPointError, match=r"step 3 .*Resume from the last checkpoint, .*step=00000002.ckpt"):
        fit(broken, trainer, tmp_path, steps=6)
    assert names(tmp_path) == ["last.ckpt", "step=00000002.ckpt"]
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_what_a_killed_run_left_is_removed(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    (tmp_path / ".step=00000009.ckpt.unfinished").mkdir()
    (tmp_path / ".step=00000009.ckpt.unfinished" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".step=00000009.ckpt.sha256.unfinished").write_text("half")
    fit(module, trainer, tmp_path, steps=2)
    assert names(tmp_path) == ["last.ckpt", "step=00000002.ckpt"]
    verify(tmp_path / "last.ckpt")


def test_the_oldest_is_removed_when_the_new_one_is_complete_and_linked(
    tmp_path: Path, module: PretrainModule, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(unfinished: Path, path: Path) -> None:
        if path.name == "step=00000006.ckpt":
            raise OSError("no space left")
        publish(unfinished, path)

    monkeypatch.setattr(step_checkpoint, "publish", no_space)
    with pytest.raises(OSError, match="no space left"):
        fit(module, trainer, tmp_path, steps=8)
    # Not sealed, not seen; what was there before stays.
    assert sorted(path.name for path in tmp_path.glob("[!.]*.ckpt")) == [
        "last.ckpt",
        "step=00000002.ckpt",
        "step=00000004.ckpt",
    ]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000004.ckpt"


def test_a_folder_that_is_saved_again_leaves_the_link_on_a_complete_one(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"step={step:08d}.ckpt").mkdir()
    last = tmp_path / "last.ckpt"
    last.symlink_to("step=00000004.ckpt")
    step_checkpoint._point_elsewhere(last, tmp_path / "step=00000004.ckpt")
    assert last.resolve().name == "step=00000002.ckpt"


@pytest.mark.multiprocess
def test_sharded_checkpoints_of_two_ranks(tmp_path: Path) -> None:
    for steps in (3, 5):
        assert run_distributed(train_sharded, 2, str(tmp_path), steps) == [steps, steps]
    assert sorted(path.name for path in tmp_path.glob("*ckpt*")) == [
        "last.ckpt",
        "step=00000004.ckpt",
        "step=00000005.ckpt",
    ]
    newest = (tmp_path / "last.ckpt").resolve()
    assert newest.name == "step=00000005.ckpt"
    assert sorted(path.name for path in newest.iterdir()) == [
        ".metadata",
        "SHA256SUMS",
        "__0_0.distcp",
        "__1_0.distcp",
        "meta.pt",
    ]
    verify(newest)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=newest, check=True)
    assert torch.load(newest / "meta.pt", weights_only=True)["global_step"] == 5


class ShardedLinear(LightningModule):
    """One layer, of which each rank holds its share."""

    def setup(self, stage: str) -> None:
        check_before_loading(self.trainer)

    def configure_model(self) -> None:
        self.linear = torch.nn.Linear(8, 8)
        assert self.device_mesh is not None
        fully_shard(self.linear, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.linear(batch).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.linear.parameters())


def train_sharded(folder: str, steps: int) -> int:
    """Train to a step as one of two ranks, from `last` if there is one. Returns: the step."""
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[StepCheckpoint(every_n_steps=1, dirpath=folder)],
    )  # fmt: skip
    trainer.fit(ShardedLinear(), torch.utils.data.DataLoader(torch.ones(99, 8)), ckpt_path="last")  # type: ignore[arg-type]  # a tensor is a dataset, too
    return trainer.global_step


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"keep": 0}])
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        StepCheckpoint(**arguments)


class Signals(Callback):
    """Sends this process signals in the first micro-batch after a step, or in a validation."""

    def __init__(self, *numbers: int, after_step: int = 1, in_validation: bool = False) -> None:
        self.numbers, self.after_step, self.in_validation = numbers, after_step, in_validation
        self.validation_batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after_step and not self.in_validation:
            self._send()

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.validation_batches += 1
        if trainer.global_step == self.after_step and self.in_validation:
            self._send()

    def _send(self) -> None:
        numbers, self.numbers = self.numbers, ()
        for number in numbers:
            signal.raise_signal(number)


def fit_with_signals(module: PretrainModule, trainer: Make, folder: Path, signals: Signals, **changes: Any) -> Any:
    callbacks = [PreemptionCheckpoint(), StepCheckpoint(every_n_steps=100, dirpath=str(folder)), signals]
    settings = {"max_steps": 6, "max_epochs": -1, "accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
    run = trainer(**(settings | changes), enable_checkpointing=True, callbacks=callbacks)
    run.fit(module, FixedBatches([random_batch([9])] * 20))
    return run


def saved(folder: Path) -> str:
    return (folder / "last.ckpt").resolve().name


LISTENED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.mark.parametrize(
    "numbers", [*((number,) for number in LISTENED), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)]
)
def test_a_signal_ends_the_run_at_the_end_of_the_step(
    tmp_path: Path, module: PretrainModule, trainer: Make, numbers: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    before = [signal.getsignal(number) for number in LISTENED]
    with caplog.at_level("INFO"):
        run = fit_with_signals(module, trainer, tmp_path, Signals(*numbers))
    assert run.global_step == 2
    assert saved(tmp_path) == "step=00000002.ckpt"
    loops = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert loops["epoch_progress"]["current"]["processed"] == 0  # the epoch is not over: data that end go on in it
    name = signal.Signals(numbers[-1]).name
    assert f"{name}: stopped after optimizer step 2; {tmp_path}/step=00000002.ckpt is its" in caplog.text
    assert [signal.getsignal(number) for number in LISTENED] == before


def test_a_second_interrupt_ends_at_once(
    tmp_path: Path,
    module: PretrainModule,
    trainer: Make,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_mixcn.callbacks.checkpoints._ECHO_SECONDS", 0.0)
    with pytest.raises(SystemExit):  # Lightning's, for a KeyboardInterrupt
        fit_with_signals(module, trainer, tmp_path, Signals(*[signal.SIGINT] * 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert not list(tmp_path.glob("*.ckpt"))
    assert capfd.readouterr().err.count("Press it again to end at once") == 1


def test_what_is_ignored_stays_ignored(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = fit_with_signals(module, trainer, tmp_path, Signals(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.global_step == 6


def test_a_terminal_that_is_gone_does_not_end_the_run() -> None:
    """Its next line would be an error of the system."""
    master, terminal = os.openpty()
    callback = PreemptionCheckpoint()
    callback._terminals = [terminal]
    os.write(terminal, b"a line")
    os.close(master)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(terminal, b"a line")
    callback._receive(signal.SIGHUP, None)
    os.write(terminal, b"a line")
    os.close(terminal)


def test_a_signal_during_the_first_checks_counts(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    signals = Signals(signal.SIGHUP, after_step=0, in_validation=True)
    run = fit_with_signals(module, trainer, tmp_path, signals, num_sanity_val_steps=1, limit_val_batches=1)
    assert run.global_step == 1


@pytest.mark.parametrize("limits", [{"min_steps": 5}, {"min_epochs": 3}])
def test_lower_limits_do_not_hold_it_up(
    tmp_path: Path, module: PretrainModule, trainer: Make, limits: dict[str, int]
) -> None:
    run = fit_with_signals(module, trainer, tmp_path, Signals(signal.SIGTERM), **limits)
    assert run.global_step == 2
    assert run.min_steps == limits.get("min_steps")


def test_a_validation_that_is_due_is_left_out(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    signals = Signals(signal.SIGTERM)
    run = fit_with_signals(module, trainer, tmp_path, signals, limit_val_batches=2, val_check_interval=6)
    assert run.global_step == 2
    assert signals.validation_batches == 0
    assert run.limit_val_batches == 2


def test_a_validation_that_runs_is_finished(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    signals = Signals(signal.SIGTERM, after_step=2, in_validation=True)
    run = fit_with_signals(module, trainer, tmp_path, signals, limit_val_batches=2, val_check_interval=6)
    assert run.global_step == 2
    assert signals.validation_batches == 2
    assert saved(tmp_path) == "step=00000002.ckpt"


def test_without_step_checkpoint_it_says_so(
    module: PretrainModule, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(callbacks=[PreemptionCheckpoint(), Signals(signal.SIGUSR1, after_step=0)], max_steps=3)
    with caplog.at_level("INFO"):
        run.fit(module, FixedBatches([random_batch([9])] * 3))
    assert run.global_step == 1
    assert "SIGUSR1: stopped after optimizer step 1; there is no StepCheckpoint" in caplog.text


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("ranks", "workers", "numbers"),
    [
        pytest.param(1, 0, (signal.SIGTERM, signal.SIGUSR1), marks=pytest.mark.slow),
        (2, 0, (signal.SIGTERM, signal.SIGINT)),
        pytest.param(1, 2, (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT), marks=pytest.mark.slow),
        pytest.param(2, 2, LISTENED, marks=pytest.mark.slow),
    ],
)
def test_mixcn_fit_is_ended_by_signals_and_goes_on(
    ranks: int, workers: int, numbers: tuple[int, ...], forked_fits: Any, fit_config: Path, tmp_path: Path
) -> None:
    content = json.loads(fit_config.read_text())
    content["data"]["init_args"]["num_workers"] = workers
    content["trainer"] |= {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "max_steps": 60}
    config = tmp_path / "fit.yaml"
    config.write_text(json.dumps(content))

    def start(folder: str) -> Path:
        arguments = ["--trainer.default_root_dir", folder, "--ckpt_path", "last"]
        forked_fits.start(tmp_path, ["fit", "--config", str(config), *arguments], ranks)
        return tmp_path / folder / "checkpoints"

    checkpoints = start("signalled")
    for number in map(signal.Signals, numbers):
        forked_fits.wait_for(checkpoints, "step=*.ckpt")
        time.sleep(0.1)
        signalled = psutil.Process(forked_fits.processes()[-1])  # one rank, not the one that writes
        for process in [*signalled.children(recursive=True), signalled]:  # SLURM's way
            process.send_signal(number)
        log = forked_fits.log
        code = 130 if number == signal.SIGINT else 0
        assert forked_fits.wait() == [code] + [0] * (ranks - 1), log.read_text()[-4000:]
        assert "Traceback" not in log.read_text()
        assert f"{number.name}: stopped after optimizer step" in log.read_text()
        reached = (checkpoints / "last.ckpt").resolve().name
        assert reached != "step=00000060.ckpt"
        start("signalled")
        forked_fits.wait_for(checkpoints, f"step={int(reached[5:13]) + 1:08d}.ckpt")
    assert forked_fits.wait() == [0] * ranks
    whole = start("whole")
    assert forked_fits.wait() == [0] * ranks
    state, expected = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (checkpoints, whole))
    assert state["global_step"] == expected["global_step"] == 60
    for name, value in expected["state_dict"].items():
        assert torch.equal(state["state_dict"][name], value), name


def arguments(config: Path, folder: Path, ranks: int, steps: int) -> list[str]:
    settings = {
        "trainer.default_root_dir": folder,
        "trainer.devices": ranks,
        "trainer.strategy": "ddp" if ranks > 1 else "auto",
        "trainer.max_steps": steps,
        "ckpt_path": "last",
    }
    return ["fit", "--config", str(config), *(f"--{name}={value}" for name, value in settings.items())]


def final_state(folder: Path, steps: int) -> dict[str, Any]:
    last = folder / "checkpoints" / "last.ckpt"
    assert last.resolve().name == f"step={steps:08d}.ckpt"
    verify(last)
    content: dict[str, Any] = torch.load(last, weights_only=True)
    return content


def assert_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert state["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        assert torch.equal(state["state_dict"][name], value), name
    assert state["PretrainDataModule"] == expected["PretrainDataModule"]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        pytest.param(1, 3, marks=pytest.mark.slow),
        (2, 3),
        pytest.param(1, 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param(2, 30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_it_goes_on_from_a_complete_checkpoint(
    ranks: int, kills: int, forked_fits: Any, fit_config: Path, tmp_path: Path
) -> None:
    draw = random.Random(10 * kills + ranks)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    checkpoints, steps = killed / "checkpoints", 10 * kills
    reached = killed_in_writing = 0
    for number in range(kills):
        forked_fits.start(tmp_path, arguments(fit_config, killed, ranks, steps), ranks)
        target = reached + draw.randint(1, 3)
        wait_for_step(forked_fits, checkpoints, target)
        before = time.monotonic()
        wait_for_step(forked_fits, checkpoints, target + 1)
        if number % 2:
            time.sleep(draw.random() * (time.monotonic() - before))  # anywhere in a step and its checkpoint
        else:
            while forked_fits.running() and not any(checkpoints.glob(".*")):
                time.sleep(0.0005)
            time.sleep(draw.random() * 0.004)  # in writing, or just after
        assert forked_fits.running()
        forked_fits.kill()
        forked_fits.wait()
        killed_in_writing += bool(list(checkpoints.glob(".*")))
        reached = check_all(checkpoints)
    assert killed_in_writing or kills < 30
    forked_fits.start(tmp_path, arguments(fit_config, killed, ranks, steps), ranks)
    assert forked_fits.wait() == [0] * ranks, forked_fits.log.read_text()[-4000:]
    assert not list(checkpoints.glob(".*"))
    forked_fits.start(tmp_path, arguments(fit_config, whole, ranks, steps), ranks)
    assert forked_fits.wait() == [0] * ranks, forked_fits.log.read_text()[-4000:]
    assert_same(final_state(killed, steps), final_state(whole, steps))


def wait_for_step(forked_fits: Any, checkpoints: Path, step: int) -> None:
    while newest_step(checkpoints) < step:
        assert forked_fits.running(), forked_fits.log.read_text()[-4000:]
        time.sleep(0.002)


def newest_step(checkpoints: Path) -> int:
    return max((int(path.stem.removeprefix("step=")) for path in checkpoints.glob("step=*.ckpt")), default=0)


def check_all(checkpoints: Path) -> int:
    """Check that whatever has a checkpoint's name is one. Returns: step of the one to go on from."""
    for path in checkpoints.glob("[!.]*.ckpt"):
        assert find_fault(path.resolve()) is None, path
    last = checkpoints / "last.ckpt"
    return int(last.resolve().stem.removeprefix("step=")) if last.exists() else 0


def test_checkpoints_go_through_no_other_folder(
    tmp_path: Path, module: PretrainModule, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkstemp(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    savers = [StepCheckpoint(1, dirpath=str(tmp_path / "ours")), ModelCheckpoint(tmp_path / "theirs", save_last=True)]
    trainer(max_steps=1, enable_checkpointing=True, callbacks=savers).fit(module, FixedBatches([random_batch([20])]))
    for path in (tmp_path / "ours" / "last.ckpt", tmp_path / "theirs" / "last.ckpt"):
        assert find_fault(path.resolve()) is None
    assert not list(tmp_path.rglob(".*"))


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path: Path, module: PretrainModule, trainer: Any) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = StepCheckpoint(1, dirpath=str(tmp_path / "checkpoints"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            trainer(max_steps=1, enable_checkpointing=True, callbacks=[saver]).fit(
                module, FixedBatches([random_batch([20])])
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob(".*")), "what was written takes the space that the next try needs"


def test_a_first_checkpoint_is_the_last_one_from_its_first_moment(
    tmp_path: Path, module: PretrainModule, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a job that is killed between the two has a checkpoint, and nothing under the name that it resumes from."""
    seen = list[tuple[str, str]]()

    def noting(unfinished: Path, path: Path) -> None:
        seen.append((path.name, os.readlink(path.with_name("last.ckpt"))))
        publish(unfinished, path)

    monkeypatch.setattr(step_checkpoint, "publish", noting)
    saver = StepCheckpoint(1, keep=1, dirpath=str(tmp_path))
    data = FixedBatches([random_batch([20])] * 3)
    trainer(max_steps=3, enable_checkpointing=True, callbacks=[saver]).fit(module, data)
    one, two, three = (f"step=0000000{step}.ckpt" for step in (1, 2, 3))
    assert seen == [(one, one), (two, one), (three, two)]
    # Killed before the first one had its name.
    (tmp_path / three).unlink()
    (tmp_path / f".{three}.lock").touch()
    step_checkpoint.restore_last(tmp_path)
    assert not os.path.lexists(tmp_path / "last.ckpt")


def test_names_of_folders() -> None:
    for name in ("检查点\u3000一", "a\xa0b", "../a"):  # an ideographic space is no control character
        assert StepCheckpoint(dirpath=name).dirpath is not None
    for name in (".", "..", "/", "a\nb", "a\x1b[2J"):
        with pytest.raises(UserError, match="expected a folder for checkpoints"):
            StepCheckpoint(dirpath=name)
