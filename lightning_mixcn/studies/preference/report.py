"""What filled-in sheets say, as files and as a table to read."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_mixcn.studies.tables import aligned, write_csv

from .scores import ANCHOR_ELO, Figure, PreferenceScores


def write_preferences(folder: Path, scores: PreferenceScores) -> None:
    """Write pairs.csv, models.csv, judges.csv, table.txt and preference.json."""
    tables = {
        "pairs": [_flat(pair._asdict()) for pair in scores.pairs],
        "models": [_flat(model._asdict()) for model in scores.models],
        "judges": [_flat(side._asdict()) for side in scores.sides],
    }
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows)
    report: dict[str, Any] = {name: [_without_nan(row) for row in rows] for name, rows in tables.items()}
    report["agreement"] = scores.agreement()
    report["elo_anchor"] = {"model": scores.matches.models[0], "elo": ANCHOR_ELO}
    content = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "preference.json").write_text(content + "\n", encoding="utf-8")
    (folder / "table.txt").write_text(preference_table(scores) + "\n", encoding="utf-8")


def preference_table(scores: PreferenceScores) -> str:
    """Return pairs, models, judges and agreement, aligned."""
    blocks = [aligned(list(lines)) for lines in (_pair_lines(scores), _model_lines(scores), _side_lines(scores))]
    if any(math.isnan(model.elo.value) for model in scores.models):
        blocks[1] += "\nNo finite Elo: some models won, or lost, every verdict against the others."
    return "\n\n".join([*blocks, _agreement_line(scores)])


def _pair_lines(scores: PreferenceScores) -> Iterator[list[str]]:
    yield ["model", "against", "verdicts", "wins", "ties", "losses", "wins + ties/2", "95 %", "p"]
    for pair in scores.pairs:
        shares = [_percent(figure.value) for figure in (pair.win, pair.tie, pair.loss, pair.score)]
        yield [pair.model, pair.other, str(pair.verdicts), *shares, _interval(pair.score), _number(pair.p_value, ".4f")]


def _model_lines(scores: PreferenceScores) -> Iterator[list[str]]:
    yield ["model", "", "verdicts", "wins + ties/2", "Elo", "95 %"]
    for place, model in enumerate(scores.models):
        between = "(anchor)" if place == 0 else _range(model.elo, ".0f")
        yield [
            model.model, "", str(model.verdicts), _percent(model.score.value), _number(model.elo.value, ".0f"), between
        ]  # fmt: skip


def _side_lines(scores: PreferenceScores) -> Iterator[list[str]]:
    yield ["judge", "", "verdicts", "missing", "ties", "left + ties/2", "95 %"]
    for side in scores.sides:
        cells = [_percent(side.tie), _percent(side.left.value), _interval(side.left)]
        yield [side.judge, "", str(side.verdicts), str(side.missing), *cells]


def _agreement_line(scores: PreferenceScores) -> str:
    found = scores.agreement()
    if found["judges"] == 1:
        return "One judge: no agreement to measure."
    coefficients = {"Cohen's kappa": found["cohen_kappa"], "Krippendorff's alpha": found["krippendorff_alpha"]}
    parts = [f"{name} {value:.3f}" for name, value in coefficients.items() if value is not None]
    equal = found["observed_agreement"]
    share = [] if equal is None else [f"{equal:.1%} of pairs of verdicts equal"]
    return ", ".join([f"{found['items_with_several_verdicts']} items with several verdicts", *share, *parts])


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return figures as three columns."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Figure):
            flat |= {name: value.value, f"{name}_low_95": value.low, f"{name}_high_95": value.high}
        else:
            flat[name] = value
    return flat


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _percent(share: float) -> str:
    return _number(share, ".1%")


def _interval(figure: Figure) -> str:
    return _range(figure, ".1%")


def _range(figure: Figure, shape: str) -> str:
    return "-" if math.isnan(figure.low) else f"{figure.low:{shape}} to {figure.high:{shape}}"


def _number(value: float, shape: str) -> str:
    return "-" if math.isnan(value) else f"{value:{shape}}"
