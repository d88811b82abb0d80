"""What the runs of a comparison gave, put together: numbers that a rerun gives again, apart from what they cost."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_mixcn.errors import UserError
from lightning_mixcn.studies.figures import choose_fonts
from lightning_mixcn.studies.tables import csv_text, markdown_table

from .differences import (
    ABOUT_ONE_TEXT,
    PAIR_FIGURES,
    Rows,
    arm_names,
    differences_as_json,
    differences_from_reference,
    differences_table,
    draw_differences,
    draw_likelihoods,
    has_pairs,
    is_trained,
    untrained_table,
)
from .run import ComparedRun


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
        """Compute mean and deviation over the values of all seeds."""
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


# Facts of a run without training: it ends as it starts.
_UNTRAINED: dict[str, Any] = {
    "steps": 0, "tokens_seen": 0, "text_bytes_seen": 0, "parameters": {"trainable": 0, "total": None},
    "validations": [],
}  # fmt: skip


def run_result(run: ComparedRun) -> dict[str, Any]:
    """Return figures of a finished run, or of one that does not train, that do not depend on the machine's speed.

    Returns:
        ``arm``, ``seed``, ``steps``, ``tokens_seen``, ``text_bytes_seen``, ``trainable_parameters``,
        ``total_parameters``; ``sources``, each with bits per byte ``before`` and ``after``, ``tokens_per_byte`` of the
        held-out text, ``pairs`` (figures of `PAIR_FIGURES`, each ``before`` and ``after``; none without pairs of
        answers), and ``curve`` (bytes of text seen, bits per byte); ``scores`` of tasks and of the EOS probe, each
        a list of one or two numbers: before and after, or after alone.
    """
    start, facts = run.start(), run.facts() if run.trains else _UNTRAINED
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
                "pairs": {
                    figure: {"before": start[name][figure], "after": curve[-1][1][name][figure]}
                    for figure in PAIR_FIGURES
                    if figure in start[name]
                },
                "curve": [[seen, sources[name]["bits_per_byte"]] for seen, sources in curve],
            }
            for name in start
        },
        "scores": _scores(run.scores()),
    }


def run_cost(run: ComparedRun) -> dict[str, Any]:
    """Return what a finished run cost.

    Returns:
        ``arm``, ``seed``, ``tokens_per_second``, ``seconds_per_step`` (without validations), ``fit_seconds`` (with
        them) and ``peak_memory_bytes``.
    """
    facts = run.facts()
    assert facts is not None
    return {
        "arm": run.arm,
        "seed": run.seed,
        "tokens_per_second": facts["tokens_per_second"],
        "seconds_per_step": facts["training_seconds"] / facts["steps"],
        "fit_seconds": facts["fit_seconds"],
        "peak_memory_bytes": facts["peak_memory_bytes"],
    }


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
        raise UserError(f"`data`: {first!r} is validated on {sizes} bytes. Give text to validate on, e.g. val_sources")
    for run, found in others:
        if found != sizes:
            raise UserError(
                f"Arms are validated on different text: bytes by source are {sizes} in {first!r}, {found} in {run!r}. "
                "Give all arms the same `data.init_args.val_sources`, and `data.init_args.max_eval_rows: null`"
            )


def of_arm(results: Sequence[Mapping[str, Any]], arm: str) -> list[Mapping[str, Any]]:
    """Return the runs of an arm."""
    return [result for result in results if result["arm"] == arm]


def _scores(report: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """Return figures of `mixcn evaluate`, by a name for people."""
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


def save_curves(path: Path, results: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw bits per byte against bytes of text: a panel a source, a line an arm, a band from best to worst seed.

    Below, with two seeds or more, the differences from the first arm with their 95 % intervals. Without training there
    is a point an arm.

    Args:
        path: PNG to write.
        results: Results of each run, see `run_result`.
        title: Over all panels.
    """
    # Its import takes a second.
    from matplotlib.figure import Figure

    sources = list(results[0]["sources"])
    differences, arms = differences_from_reference(results), arm_names(results)
    heights = [3.6, 0.9 + 0.25 * len(differences)] if differences else [3.6]
    figure = Figure(figsize=(1 + 4 * len(sources), sum(heights)), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(len(heights), len(sources), squeeze=False, height_ratios=heights)
    for axis, source in zip(axes[0], sources, strict=True):
        axis.set_title(source, fontsize="small")
        if not is_trained(results):
            draw_likelihoods(axis, results, source)
            continue
        for arm in arms:
            curves = np.array([run["sources"][source]["curve"] for run in of_arm(results, arm)])  # [seeds, points, 2]
            seen, values = curves[:, :, 0].mean(0) / 1e6, curves[:, :, 1]
            (line,) = axis.plot(seen, values.mean(0), marker="o", markersize=3, label=arm)
            if len(curves) > 1:
                axis.fill_between(seen, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
        axis.set_xlabel("MB of text seen")
        axis.set_ylabel("bits per byte, held out")
        axis.grid(alpha=0.3)
    if is_trained(results):
        axis.legend(fontsize="small")
    for axis, source in zip(axes[-1] if differences else (), sources, strict=False):
        draw_differences(axis, differences, source, arms[0])
    choose_fonts(figure)
    # Neither date nor version: the same numbers give the same file.
    figure.savefig(path, metadata={"Software": None})


def as_markdown(title: str, results: Rows, costs: Rows) -> str:
    """Return tables of all arms: bits per byte by source, differences, amounts and cost, and tasks where there are any.

    Args:
        title: Heading.
        results: Results of each run, see `run_result`.
        costs: Costs of each run, see `run_cost`.
    """
    arms = arm_names(results)
    seeds = len(of_arm(results, arms[0]))
    spread = f"Mean ± standard deviation over {seeds} seeds. " if seeds > 1 else "One seed. "
    meaning = "Bits per byte of held-out text: less is better, and they compare across vocabularies and languages."
    if is_trained(results):
        parts = [f"{spread}{meaning}", _likelihoods(arms, results), differences_table(results)]
        parts.append(_amounts(arms, results, costs))
    else:
        parts = [f"Nothing is trained. {meaning} {ABOUT_ONE_TEXT}", untrained_table(results)]
    parts.insert(0, f"# {title}")
    if has_pairs(results):
        parts.insert(3, _pairs_table(arms, results))
    if any(result["scores"] for result in results):
        parts.append(_scores_table(arms, results))
    return "\n\n".join(parts) + "\n"


def runs_as_csv(results: Rows) -> str:
    """Return a line of CSV for each run and source."""
    shared = ("arm", "seed", "steps", "tokens_seen", "text_bytes_seen", "trainable_parameters", "total_parameters")
    lines = [
        {name: result[name] for name in shared}
        | {
            "source": source,
            "tokens_per_byte_held_out": found["tokens_per_byte"],
            "bits_per_byte_before": found["before"],
            "bits_per_byte_after": found["after"],
        }
        for result in results
        for source, found in result["sources"].items()
    ]
    return csv_text(lines)


def as_json(settings: Mapping[str, Any], results: Rows) -> str:
    """Return settings, all results, curves included, and the arms' differences from the first one."""
    content = {"settings": settings, "runs": list(results), "differences": differences_as_json(results)}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _likelihoods(arms: Sequence[str], results: Rows) -> str:
    sources = list(results[0]["sources"])
    head = ["arm", *(f"{source} {when}" for source in sources for when in ("before", "after", "change"))]
    lines = []
    for arm in arms:
        cells = [arm]
        for source in sources:
            pairs = [
                (run["sources"][source]["before"], run["sources"][source]["after"]) for run in of_arm(results, arm)
            ]
            cells += [_shown(Spread.of(before for before, _ in pairs)), _shown(Spread.of(after for _, after in pairs))]
            cells.append(_shown(Spread.of(after - before for before, after in pairs), "+.3f"))
        lines.append(cells)
    return markdown_table([head, *lines])


def _pairs_table(arms: Sequence[str], results: Rows) -> str:
    """Return a table of held-out pairs of answers, before → after, which means the same for every loss."""
    head, lines = ["pairs of answers, before → after"], [[arm] for arm in arms]
    for source, found in results[0]["sources"].items():
        for figure in found["pairs"]:
            head.append(f"{source} {PAIR_FIGURES[figure]}")
            for line in lines:
                values = [run["sources"][source]["pairs"][figure] for run in of_arm(results, line[0])]
                ends = (_shown(Spread.of(each[end] for each in values)) for end in ("before", "after"))
                line.append(" → ".join(ends))
    return markdown_table([head, *lines])


def _amounts(arms: Sequence[str], results: Rows, costs: Rows) -> str:
    sources = list(results[0]["sources"])
    head = ["arm", "text, bytes", "tokens", "steps", *(f"tokens per byte, {source}" for source in sources)]
    head += ["trained parameters", "tokens/s", "seconds a step", "time", "peak memory"]
    lines = []
    for arm in arms:
        runs, cost = of_arm(results, arm), of_arm(costs, arm)
        cells = [arm, *(f"{_mean(runs, name):,.0f}" for name in ("text_bytes_seen", "tokens_seen", "steps"))]
        cells += [f"{runs[0]['sources'][source]['tokens_per_byte']:.3f}" for source in sources]
        cells += [f"{runs[0]['trainable_parameters']:,}", f"{_mean(cost, 'tokens_per_second'):,.0f}"]
        cells += [f"{_mean(cost, 'seconds_per_step'):.3g}"]
        cells += [f"{_mean(cost, 'fit_seconds') / 60:,.1f} min", f"{_mean(cost, 'peak_memory_bytes') / 1e9:.2f} GB"]
        lines.append(cells)
    return markdown_table([head, *lines])


def _scores_table(arms: Sequence[str], results: Rows) -> str:
    """Return a table whose rows are tasks: there may be many."""
    lines = []
    for name in results[0]["scores"]:
        cells = [name]
        for arm in arms:
            values = [run["scores"][name] for run in of_arm(results, arm) if name in run["scores"]]
            ends = (
                [_shown(Spread.of(each[place] for each in values)) for place in range(len(values[0]))] if values else []
            )
            cells.append(" → ".join(ends) or "-")
        lines.append(cells)
    return markdown_table([["task, before → after", *arms], *lines])


def _shown(spread: Spread, form: str = ".3f") -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.3f}"
    return f"{spread.mean:{form}}{deviation}"


def _mean(rows: Rows, name: str) -> float:
    return Spread.of(row[name] for row in rows).mean
