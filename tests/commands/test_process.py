import sys
from pathlib import Path

import pytest

from lightning_mixcn.commands.process import (
    CommandFailed,
    output_of_mixcn,
    run,
    run_mixcn,
)


def test_peak_memory_is_that_of_the_child(capfd: pytest.CaptureFixture[str]) -> None:
    small = run([sys.executable, "-c", "print('out')"], shown="small")
    # On Linux a child starts from its parent's peak, so "large" is larger than this process ever was.
    block = small.peak_rss_bytes + 100_000_000
    large = run([sys.executable, "-c", f"block = b'x' * {block}"], shown="large")
    assert large.peak_rss_bytes > block
    # Measured after the large one, so that a maximum over all children so far would show.
    again = run([sys.executable, "-c", "pass"], shown="again")
    assert again.peak_rss_bytes < block
    assert capfd.readouterr().out.splitlines() == ["$ small", "out", "$ large", "$ again"]


def test_a_failure_names_the_command_and_its_exit_code() -> None:
    with pytest.raises(CommandFailed, match=r"`bad --x` ended with exit code 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"], shown="bad --x")


def test_mixcn_is_run_by_this_python(capfd: pytest.CaptureFixture[str]) -> None:
    run_mixcn(["--help"])
    out = capfd.readouterr().out
    assert out.startswith("$ mixcn --help\n")
    assert "fit" in out


def test_output_and_errors_can_be_read() -> None:
    assert output_of_mixcn(["--version"]).startswith("mixcn ")
    with pytest.raises(CommandFailed, match=r"^unknown subcommand 'x'"):
        output_of_mixcn(["x"])


def test_a_descriptor_can_be_inherited(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        run(
            [sys.executable, "-c", f"import os; os.write({file.fileno()}, b'kept')"], "write", inherited=[file.fileno()]
        )
    assert (tmp_path / "file").read_text() == "kept"
