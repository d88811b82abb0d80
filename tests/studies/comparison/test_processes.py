"""`mixcn compare` as it is used: in processes, killed, and for another language than Chinese."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_mixcn.cli import main
from tests.studies.comparison.compare_recipes import InThisProcess, lines_of, write_study

pytestmark = pytest.mark.slow


@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_kill_9(tmp_path: Path, tiny_base: Path) -> None:
    """All of it, in the middle of the first run; then the study alone, whose command lives on and is waited for."""
    recipe = write_study(tmp_path, tiny_base, text_bytes=2_000, prepare=None,
                         arms={"a": {}, "b": {"model.init_args.lora.r": 4}})  # fmt: skip
    # One number of threads, so that sums are added in one order.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "lightning_mixcn", "compare", str(recipe), f"--out={out}"]

    checkpoints = tmp_path / "killed" / "runs" / "a" / "seed0" / "fit" / "checkpoints" / "last.ckpt"
    begins = tmp_path / "killed" / "runs" / "b" / "seed0" / "fit"
    for awaited, is_group in ((checkpoints, True), (begins, False)):
        study = subprocess.Popen(
            command("killed"), cwd=tmp_path, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while not awaited.exists() and study.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if is_group:
            os.killpg(study.pid, signal.SIGKILL)
        else:
            study.kill()
        assert study.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "comparison.json").exists()
    for out in ("killed", "whole"):
        done = subprocess.run(command(out), cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in ("comparison.csv", "comparison.json", "comparison.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_another_language(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the text and the script of the new pieces is another."""
    monkeypatch.chdir(tmp_path)
    InThisProcess().patch(monkeypatch)
    recipe = write_study(tmp_path, tiny_base, "ru")
    assert main(["compare", str(recipe), "--out=study"]) == 0
    found = {(line["arm"], line["source"]): line for line in lines_of(tmp_path / "study" / "comparison.csv")}
    assert set(found) == {(arm, source) for arm in ("base", "longer") for source in ("ru", "en")}
    tokens = {key: float(line["tokens_per_byte_held_out"]) for key, line in found.items()}
    assert tokens["longer", "ru"] < 0.7 * tokens["base", "ru"]
    assert tokens["longer", "en"] == tokens["base", "en"]
    assert all(float(line["bits_per_byte_after"]) < float(line["bits_per_byte_before"]) for line in found.values())
