"""What the runs of a comparison gave, put together: numbers that a rerun gives again, apart from what they cost."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .compare_run import ComparedRun


class Spread(NamedTuple):
    """A figure over seeds.

    Args:
        mean: Over the seeds.
        deviation: Sample standard deviation; ``None`` for one seed.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of the values of all seeds."""
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


def run_result(run: ComparedRun) -> dict[str, Any]:
    """Figures of a finished run that do not depend on the machine's speed.

    Returns:
        ``arm``, ``seed``, ``steps``, ``tokens_seen``, ``text_bytes_seen``, ``trainable_parameters``,
        ``total_parameters``; ``sources``, each with bits per byte ``before`` and ``after``, ``tokens_per_byte`` of the
        held-out text, and ``curve`` (bytes of text seen, bits per byte); ``scores`` of tasks and of the EOS probe, each
        a list of one or two numbers: before and after, or after alone.
    """
    start, facts = run.start(), run.facts()
    assert start is not None
    assert facts is not None
    curve = [(0, start)] + [(part["text_bytes_seen"], part["sources"]) for part in facts["validations"]]
    return {
        "arm": run.arm,
        "seed": run.seed,
        "steps": facts["steps"],
        "tokens_seen": facts["tokens_seen"],
        "text_bytes_seen": facts["text_bytes_seen"],
        "trainable_parameters": facts["parameters"]["trainable"],
        "total_parameters": facts["parameters"]["total"],
        "sources": {
            name: {
                "before": start[name]["bits_per_byte"],
                "after": curve[-1][1][name]["bits_per_byte"],
                "tokens_per_byte": start[name]["tokens"] / start[name]["bytes"],
                "curve": [[seen, sources[name]["bits_per_byte"]] for seen, sources in curve],
            }
            for name in start
        },
        "scores": _scores(run.scores()),
    }


def run_cost(run: ComparedRun) -> dict[str, Any]:
    """What a finished run took: ``arm``, ``seed``, ``tokens_per_second``, ``fit_seconds``, ``peak_memory_bytes``."""
    facts = run.facts()
    assert facts is not None
    names = "tokens_per_second", "fit_seconds", "peak_memory_bytes"
    return {"arm": run.arm, "seed": run.seed} | {name: facts[name] for name in names}


def require_same_text(starts: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all runs are validated on the same text.

    Args:
        starts: Likelihoods of each source before training, by run.

    Raises:
        ValueError: They are not, so that their bits per byte cannot be compared; or a source has no text.
    """
    (first, sizes), *others = [
        (run, {source: int(found["bytes"]) for source, found in of_run.items()}) for run, of_run in starts.items()
    ]
    if not sizes or not all(sizes.values()):
        raise ValueError(f"`data`: {first!r} is validated on {sizes} bytes. Give text to validate on, e.g. val_sources")
    for run, found in others:
        if found != sizes:
            raise ValueError(
                f"Arms are validated on different text: bytes by source are {sizes} in {first!r}, {found} in {run!r}. "
                "Give all arms the same `data.init_args.val_sources`, and `data.init_args.max_eval_rows: null`"
            )


def of_arm(results: Sequence[Mapping[str, Any]], arm: str) -> list[Mapping[str, Any]]:
    """The runs of an arm."""
    return [result for result in results if result["arm"] == arm]


def _scores(report: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """Figures of `mixcn evaluate`, by a name for people."""
    if report is None:
        return {}
    found = {
        f"{row['task']} {row['metric']} ({row['language']})": list(row["scores"].values()) for row in report["rows"]
    }
    probes = list(report.get("eos_probe", {}).get("models", {}).values())
    for source in probes[0] if probes else ():
        values = [probe[source]["mean_after_newline"] for probe in probes]
        if None not in values:
            found[f"P(EOS after a line break) ({source})"] = values
    return found
