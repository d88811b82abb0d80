"""The demo's figures: put together, checked, and printed."""

import math
from collections.abc import Mapping
from typing import Any

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
        raise ValueError(f"report: expected positive figures, came {bad}. Remove runs/demo and run the demo again.")
    shared = report["text"]["shared_24_token_runs"]
    if shared != 0:
        raise ValueError(f"text: training and held-out documents share {shared} runs of 24 tokens, expected 0.")


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
