"""Everything that is to be measured on a GPU, in one command and one file.

    make gpu                                                                  # runs/gpu, 9.3 minutes
    python benchmarks/gpu_all.py --out runs/gpu --minutes 9.3                 # the same; one GPU of 80 GB
    python benchmarks/gpu_all.py --out runs/gpu --layers 8                    # a GPU of 24 GB
    python benchmarks/gpu_all.py --out runs/try --layers 1 --hidden 256 --intermediate 512 --minutes 1   # to try it

Stages run one after the other, in order of worth, each in a process group of its own with a time limit: env (card,
versions, rates), correct (tests marked `gpu`), block (each path of the expert block), step (training steps of 8x7B),
generate, long (prefill and steps of long rows), decide (which path wins). gpu.json is written after each. One that
fails or is late is a line with its error, and later ones go on; one that has too little time left is not started.
Weights are random and drawn on the device: nothing is downloaded, and less than a megabyte is written. Without a GPU
all stages run on the CPU with small sizes, which shows that the script works, and nothing else.

Files in --out: gpu.json (figures), gpu.log (what was printed), fastest.json (the winners, to take the place of
lightning_mixcn/model/experts/fastest.json). Exit code 1 if `correct` did not pass.
"""

import argparse
import datetime
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_stages.running import STAGES, Deadline, Figures, Stage, limit_seconds, read_figures, run_stage, write_figures

ROOT = Path(__file__).resolve().parents[1]
# Managed memory, which these states take, can hang a card that others use, too.
PAGED = "tests/modules/test_checks.py::test_on_a_gpu[PagedAdamW8bit]"
_FIGURES = ".stage.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.log and fastest.json")
    parser.add_argument("--minutes", type=float, default=9.3, help="minutes for all stages together (9.3)")
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--only", nargs="+", choices=names, help="these stages; the figures of others stay as they are in --out"
    )
    parser.add_argument("--layers", type=int, help="decoder layers, fewer for less than 80 GB (32)")
    parser.add_argument("--hidden", type=int, help="hidden size, to try the script (4096)")
    parser.add_argument("--intermediate", type=int, help="hidden size of an expert, to try the script (14336)")
    parser.add_argument(
        "--tests", nargs="+", metavar="FILE", help="test files of `correct`; all that have the mark gpu"
    )
    parser.add_argument(
        "--deselect",
        nargs="*",
        metavar="TEST",
        default=[PAGED],
        help="tests that `correct` leaves out; the default can hang a card that is shared. None: all run",
    )
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: expected more than 0")
    return options


def main() -> int:
    """Run all stages, or be one of them."""
    options = parse()
    if options.stage:
        return run_as_stage(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage is killed, too
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Run the stages and keep gpu.json; return the exit code."""
    from lightning_mixcn.cli.allocator import grow_gpu_segments

    grow_gpu_segments()
    # What is measured is this checkout, wherever another one is installed.
    os.environ.pop("TRITON_INTERPRET", None)  # and its kernels are compiled
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    options.out.mkdir(parents=True, exist_ok=True)
    file, deadline = options.out / "gpu.json", Deadline(options.minutes)
    results = results_so_far(file, options)
    asked = [stage for stage in STAGES if not options.only or stage.name in options.only]
    with (options.out / "gpu.log").open("w", encoding="utf-8") as log:
        for number, stage in enumerate(asked):
            results["stages"][stage.name] = one_stage(stage, asked[number + 1 :], deadline, options, log)
            write_figures(file, results)
    for name, entry in results["stages"].items():
        print(f"{name:9} {entry.get('seconds', 0):6.1f} s  {entry.get('error', 'done')}")
    print(f"written to {file} and beside it")
    correct = results["stages"].get("correct", {}).get("figures", {}).get("ok", False)
    return 0 if correct or "correct" not in [stage.name for stage in asked] else 1


def results_so_far(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the beginning of gpu.json, with the stages of an earlier run if only some are asked for now."""
    kept = {}
    if options.only:
        with suppress(FileNotFoundError):
            kept = read_figures(file)["stages"]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    sizes = {name: getattr(options, name) for name in ("layers", "hidden", "intermediate")}
    return {"started": now, "minutes": options.minutes, "sizes": sizes, "stages": kept}


def one_stage(
    stage: Stage, later: Sequence[Stage], deadline: Deadline, options: argparse.Namespace, log: Any
) -> dict[str, Any]:
    """Run a stage if there is time for it; return its entry."""
    left = deadline.left()
    limit = limit_seconds(stage, left, later)
    if not limit:
        print(f"{stage.name}: not started, {left:.0f} s are left", flush=True)
        return {"error": f"not started: {left:.0f} of {60 * options.minutes:.0f} s were left"}
    print(f"{stage.name}: at most {limit:.0f} s, {left / 60:.1f} minutes are left", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), *stage_arguments(stage, limit, options)]
    entry = run_stage(command, limit, options.out / _FIGURES, log)
    print(f"{stage.name}: {entry['seconds']:.0f} s, {entry.get('error', 'done')}", flush=True)
    return entry


def stage_arguments(stage: Stage, limit: float, options: argparse.Namespace) -> list[str]:
    """Return the command line of a stage's process."""
    arguments = ["--stage", stage.name, "--seconds", f"{limit:.1f}", "--out", str(options.out)]
    for name in ("layers", "hidden", "intermediate"):
        if (size := getattr(options, name)) is not None:
            arguments += [f"--{name}", str(size)]
    return [*arguments, *(["--tests", *options.tests] if options.tests else []), "--deselect", *options.deselect]


def run_as_stage(options: argparse.Namespace) -> int:
    """Run a stage in this process; its error is among its figures."""
    figures = Figures(options.out / _FIGURES)
    faulthandler.dump_traceback_later(max(1.0, options.seconds - 1))  # where a late one was, before it is killed
    try:
        from gpu_stages.settings import Settings

        from lightning_mixcn.cli.allocator import keep_freed_memory

        keep_freed_memory()
        import_module(f"gpu_stages.{options.stage}").run(Settings(options), figures)
    except Exception as error:
        traceback.print_exc()
        figures["error"] = f"{type(error).__name__}: {error}"
    figures.save()
    return 1 if "error" in figures else 0


if __name__ == "__main__":
    sys.exit(main())
