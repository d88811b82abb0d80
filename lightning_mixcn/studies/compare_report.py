"""The comparison as tables: Markdown to read, CSV and JSON to work with."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .compare_results import Spread, of_arm

Rows = Sequence[Mapping[str, Any]]


def as_markdown(title: str, results: Rows, costs: Rows) -> str:
    """Tables of all arms: bits per byte of each source, then amounts and cost, then tasks where there are any.

    Args:
        title: Heading.
        results: Of each run, see `run_result`.
        costs: Of each run, see `run_cost`.
    """
    arms = list(dict.fromkeys(result["arm"] for result in results))
    seeds = len(of_arm(results, arms[0]))
    spread = f"Mean ± standard deviation over {seeds} seeds. " if seeds > 1 else "One seed. "
    parts = [
        f"# {title}",
        f"{spread}Bits per byte of held-out text: less is better, and they compare across vocabularies and languages.",
        _likelihoods(arms, results),
        _amounts(arms, results, costs),
    ]
    if any(result["scores"] for result in results):
        parts.append(_scores_table(arms, results))
    return "\n\n".join(parts) + "\n"


def as_csv(results: Rows) -> str:
    """A line for each run and source."""
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
    return _csv(lines)


def costs_as_csv(costs: Rows) -> str:
    """A line for each run: what differs from one machine and time to the other."""
    return _csv(costs)


def as_json(settings: Mapping[str, Any], results: Rows) -> str:
    """Settings and all results, curves included."""
    return json.dumps({"settings": settings, "runs": list(results)}, ensure_ascii=False, indent=1) + "\n"


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
    return _table(head, lines)


def _amounts(arms: Sequence[str], results: Rows, costs: Rows) -> str:
    sources = list(results[0]["sources"])
    head = ["arm", "text, bytes", "tokens", "steps", *(f"tokens per byte, {source}" for source in sources)]
    head += ["trained parameters", "tokens/s", "time", "peak memory"]
    lines = []
    for arm in arms:
        runs, cost = of_arm(results, arm), of_arm(costs, arm)
        cells = [arm, *(f"{_mean(runs, name):,.0f}" for name in ("text_bytes_seen", "tokens_seen", "steps"))]
        cells += [f"{runs[0]['sources'][source]['tokens_per_byte']:.3f}" for source in sources]
        cells += [f"{runs[0]['trainable_parameters']:,}", f"{_mean(cost, 'tokens_per_second'):,.0f}"]
        cells += [f"{_mean(cost, 'fit_seconds') / 60:,.1f} min", f"{_mean(cost, 'peak_memory_bytes') / 1e9:.2f} GB"]
        lines.append(cells)
    return _table(head, lines)


def _scores_table(arms: Sequence[str], results: Rows) -> str:
    """Rows are tasks here: there may be many."""
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
    return _table(["task, before → after", *arms], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _shown(spread: Spread, form: str = ".3f") -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.3f}"
    return f"{spread.mean:{form}}{deviation}"


def _mean(rows: Rows, name: str) -> float:
    return Spread.of(row[name] for row in rows).mean


def _csv(lines: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
