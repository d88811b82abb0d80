import sys

import pytest

from lightning_mixcn.commands import CommandFailed, run, run_mixcn


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
