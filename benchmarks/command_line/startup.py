"""What a person waits for at the prompt: help, and the package's import, beside Python alone and the parser of a run.

    python benchmarks/command_line/startup.py                 # files in the page cache
    python benchmarks/command_line/startup.py --cold          # dropped from it before each start, as after a boot

Each start is a process of its own, and they take turns. Seconds on the clock are those of a quiet core only where the
machine has nothing else to do; seconds of the processor hold anyway. `the parser of a run` is what `mixcn fit` makes
before it does anything, and what `fit --help` took its page from before it was read from sources.
"""

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from lightning_mixcn.commands.table import FUNCTIONS, NESTED

RUNS = ("fit", "validate", "test", "predict")
TOPICS = ("trainer", "callbacks", "strategies", "optimizers", "PretrainDataModule", "ExpertLoadMonitor")
_PARSER = "from lightning_mixcn.cli.trainer import MixcnCLI; MixcnCLI(['fit', '--help'])"


def starts() -> dict[str, list[str]]:
    """Return what is started, by the name that it is printed with."""
    functions = [f"{name}{inner}" for name in FUNCTIONS for inner in ("", *(f" {n}" for n in NESTED.get(name, ())))]
    commands = [*(f"{name} --help" for name in ("", *RUNS, *functions)), *(f"help {topic}" for topic in TOPICS)]
    python = [sys.executable, "-c"]
    return {
        "python alone": [*python, "pass"],
        "import lightning_mixcn": [*python, "import lightning_mixcn"],
        **{
            f"mixcn {command.strip()}": [sys.executable, "-m", "lightning_mixcn", *command.split()]
            for command in commands
        },
        "the parser of a run": [*python, _PARSER],
    }


def installed_files() -> list[Path]:
    """List the sources and libraries that a start may read: Python's, the packages' and ours."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    folders.add(Path(__file__).resolve().parents[2] / "lightning_mixcn")
    return [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".pyc", ".so")]


def drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Return seconds on the clock and of the processor."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{command} failed: {said.decode()}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Start everything in turn, and print medians and the most."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed starts of each, after one that is not")
    parser.add_argument("--cold", action="store_true", help="drop installed files from the page cache before each")
    parser.add_argument("--only", default="", help="text in the names of what is started")
    options = parser.parse_args()
    files = installed_files() if options.cold else []
    taken: dict[str, list[tuple[float, float]]] = {}
    for number in range(options.rounds + 1):
        for name, command in starts().items():
            if options.only in name:
                drop(files)
                measured = seconds_of(command)
                taken.setdefault(name, []).extend([measured] * bool(number))  # the first round warms up
    print(f"{'':34} clock: median, most    processor: median")
    for name, pairs in taken.items():
        clock, processor = zip(*pairs, strict=True)
        print(f"{name:34} {statistics.median(clock):6.2f} {max(clock):6.2f} s  {statistics.median(processor):14.2f} s")


if __name__ == "__main__":
    main()
