"""A run whose processes are all killed at random moments ends in the weights of one that never stopped."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mixcn.modules.checkpoints import find_fault, verify

pytestmark = pytest.mark.multiprocess


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


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        (1, 5),
        (2, 5),
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
            time.sleep(draw.random() * 0.004)  # in writing, or just behind
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
