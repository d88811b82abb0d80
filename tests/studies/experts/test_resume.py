"""`mixcn experts` killed and restarted, and started again with other arguments."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.studies.parts import StudyParts
from tests.studies.experts.experts_command import arguments

pytestmark = pytest.mark.usefixtures("no_pictures")


def contents(out: Path) -> dict[str, Any]:
    """Every file, and the report without its time."""
    found: dict[str, Any] = {file.name: file.read_bytes() for file in out.iterdir()}
    report = json.loads(found.pop("experts.json"))
    assert report.pop("seconds") > 0
    return found | {"report": report}


@contextmanager
def kill_at(part: int) -> Iterator[list[str]]:
    """Let the study die when it has finished some parts; what it has saved."""
    save: Any = StudyParts.save
    saved: list[str] = []

    def dying(self: StudyParts, name: str, arrays: Any) -> None:
        if len(saved) == part:
            raise KeyboardInterrupt
        save(self, name, arrays)
        saved.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudyParts, "save", dying)
        yield saved


@pytest.mark.usefixtures("pictures")
def test_killed_and_restarted_it_gives_the_same_files(routed_base: Path, texts: list[Path], tmp_path: Path) -> None:
    whole, resumed = (arguments(routed_base, tmp_path / name / "out", texts) for name in ("whole", "resumed"))
    assert main(whole) == 0
    for part in (1, 2, 5):
        with kill_at(part):
            assert main(resumed) == 130
        assert [path.name for path in (tmp_path / "resumed").iterdir()] == [".out.unfinished"]
    with kill_at(-1) as saved:
        assert main(resumed) == 0
    assert len(saved) == 3 * 4 - 8  # batches × (model + layers), less what was there
    first, again = contents(tmp_path / "whole" / "out"), contents(tmp_path / "resumed" / "out")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.usefixtures("pictures")
def test_kill_9(routed_base: Path, texts: list[Path], tmp_path: Path) -> None:
    command, whole = (
        [sys.executable, "-m", "lightning_mixcn", *arguments(routed_base, tmp_path / name, texts, "--max_tokens=900")]
        for name in ("out", "whole")
    )
    # One number of threads, so that sums are added in one order.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob(".out.unfinished/batch*"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    for once in (command, whole):
        assert subprocess.run(once, env=environment, check=False, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_same_again_and_another_study(
    routed_base: Path,
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(routed_base, tmp_path / "out", texts)
    assert main(command) == 0
    ranking = capsys.readouterr().out
    before = contents(tmp_path / "out")
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == ranking
    assert "was finished before" in again.err
    assert main([*command, "--mode=mask"]) == 2
    assert "holds a study with `mode='both'`, but now it is 'mask'" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    with kill_at(2):
        assert main(arguments(routed_base, tmp_path / "other", texts)) == 130
    capsys.readouterr()
    assert main([*arguments(routed_base, tmp_path / "other", texts), "--max_tokens=100"]) == 2
    error = capsys.readouterr().err
    assert "`max_tokens=150`, but now it is 100" in error
    assert error.count("\n") == 1


def test_text_that_changed_is_another_study(
    routed_base: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "zh.jsonl"
    file.write_bytes(texts[0].read_bytes())
    command = arguments(routed_base, tmp_path / "out", [file])
    assert main(command) == 0
    file.write_bytes(texts[1].read_bytes())
    assert main(command) == 2
    assert "text_fingerprint" in capsys.readouterr().err
