"""Stage 2: the tests that are marked `gpu`, counted as they end; it stops by itself when its time is over."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gpu_stages.running import Figures
from gpu_stages.settings import Settings

ROOT = Path(__file__).parents[2]
_SHOWN = 40  # failures whose messages are kept
# Seconds of one test, below the stage's limit: a hanging one is a failure, and the others are still counted.
_TEST_SECONDS = 45
# Of the stage, in which no test begins: later stages need the time that it had for its start, and a test may be long.
_LAST_SECONDS, _LAST_SHARE = 50, 0.25
# What all else depends on comes first.
_FIRST = ("tests/model/kernels", "tests/model/experts", "tests/model/nf4", "tests/model")


class Recorder:
    """A plugin of pytest that keeps count in the stage's figures, and ends a session that would be killed.

    Args:
        settings: Those of the stage.
        figures: Figures of the stage.
    """

    def __init__(self, settings: Settings, figures: Figures) -> None:
        self.settings, self.figures, self.counts = settings, figures, Counter[str]()
        self.chosen = 0
        figures |= {"counts": {}, "failures": {}, "seconds": {}}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the tests that are to run."""
        self.chosen = len(session.items)

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Stop before a test for which there is no time, and say that nothing more is to be done for it."""
        if self.settings.left() >= min(_LAST_SECONDS, _LAST_SHARE * self.settings.options.seconds):
            return None
        item.session.shouldstop = "the stage's time is over"
        return True

    def pytest_collectreport(self, report: Any) -> None:
        """Count files that cannot be collected."""
        if report.failed:
            self._note("errors", report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test: its call, or what went wrong before or after it."""
        if report.when == "call":
            self.figures["seconds"][report.nodeid] = round(report.duration, 2)
        if report.when == "call" or report.skipped:
            self._note(report.outcome, report)
        elif report.failed:
            self._note("errors", report)

    def _note(self, outcome: str, report: Any) -> None:
        self.counts[outcome] += 1
        self.figures["counts"] = dict(self.counts)
        if report.failed and len(self.figures["failures"]) < _SHOWN:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.figures["failures"][report.nodeid] = " ".join(lines or str(report.longrepr).splitlines()[-1:])[:300]
        self.figures.save()


def run(settings: Settings, figures: Figures) -> None:
    """Run the tests; `ok` is true if all passed, and some did where there is a GPU."""
    paths = settings.options.tests or (marked_files() if settings.on_gpu else ["tests/model/test_norm.py"])
    deselected = [word for name in settings.options.deselect for word in ("--deselect", name)]
    figures["deselected"] = list(settings.options.deselect)
    os.chdir(ROOT)
    recorder = Recorder(settings, figures)
    # The project's options of pytest need plugins that a GPU's image may not have, and make warnings errors.
    bare = ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", "-o", f"timeout={_TEST_SECONDS}"]
    chosen = ["-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-q", *deselected]
    pytest.main([f"--rootdir={ROOT}", *bare, *chosen, *(str(ROOT / path) for path in paths)], plugins=[recorder])
    counts = recorder.counts
    figures["seconds"] = dict(sorted(figures["seconds"].items(), key=lambda item: -item[1])[:15])
    figures["not_run"] = recorder.chosen - counts["passed"] - counts["failed"] - counts["skipped"]
    figures["ok"] = not counts["failed"] + counts["errors"] and (counts["passed"] > 0 or not settings.on_gpu)
    if figures["failures"]:
        first = next(iter(figures["failures"]))
        raise AssertionError(f"{counts['failed'] + counts['errors']} tests failed, the first one is {first}")
    if not figures["ok"] or figures["not_run"]:
        raise TimeoutError(f"{figures['not_run']} of {recorder.chosen} tests did not run")


def marked_files() -> list[str]:
    """Return the test files that have a mark `gpu`, or whose folder's fixtures have one.

    To collect all others takes longer than to run these.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [
        str(file.relative_to(ROOT)) for file in files if _is_marked(file) or _is_marked(file.with_name("conftest.py"))
    ]
    return sorted(marked, key=lambda name: [not name.startswith(folder) for folder in _FIRST])


def _is_marked(file: Path) -> bool:
    return file.is_file() and re.search(r"\bmark\.gpu\b", file.read_text("utf-8")) is not None
