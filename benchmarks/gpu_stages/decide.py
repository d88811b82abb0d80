"""Stage 7: which path of the expert block wins with how many rows, as the package reads it."""

import json
import math
from pathlib import Path
from typing import Any

from expert_block import fastest
from gpu_stages.running import Figures, write_figures
from gpu_stages.settings import Settings

from lightning_mixcn.model.experts import path as expert_path

PACKAGED = Path(expert_path.__file__).with_name("fastest.json")
# Relative, of bfloat16 results that are added up in another order: as in tests/model/experts/test_block.py.
TOLERANCE = 2e-2


def run(settings: Settings, figures: Figures) -> None:
    """Write fastest.json: the package's file with the winners of this card.

    Raises:
        ValueError: the block was not measured.
    """
    block = settings.figures_of("block")
    figures["excluded"] = excluded(block)
    figures["winners"] = {kind: table(block, kind) for kind in expert_path.FastestPaths._fields}
    for kind, winners in figures["winners"].items():
        print(f"  {kind}: {winners}", flush=True)
    if missing := [kind for kind, winners in figures["winners"].items() if not winners]:
        raise ValueError(f"the block was not measured ({', '.join(missing)}): nothing to decide on")
    if settings.on_gpu:
        packaged = json.loads(PACKAGED.read_text(encoding="utf-8"))
        capability = settings.figures_of("env")["capability"]
        file = settings.options.out / "fastest.json"
        write_figures(file, packaged | {capability: figures["winners"]})
        expert_path.read_fastest(file)  # what the package would refuse is an error here


def excluded(block: dict[str, Any]) -> dict[str, str]:
    """Return the paths that may not win, and why: somewhere they computed something else than `loop`."""
    return {
        path: f"differs from loop by {error:.1%} with {case['tokens']} tokens"
        for case in block.get("cases", [])
        for path, error in case["disagreement"].items()
        if not error <= TOLERANCE
    }


def table(block: dict[str, Any], kind: str) -> list[list[Any]]:
    """Return the winners as fastest.json has them; with several dropouts, by the sum of their times.

    A path takes part in a size if it agreed with `loop` there and was measured in every case.
    """
    barred, by_rows = excluded(block), dict[float, dict[str, float]]()
    cases = [case for case in block.get("cases", []) if case["training"] == (kind == "training")]
    for rows in sorted({case["rows_per_expert"] for case in cases}):
        same = [case for case in cases if case["rows_per_expert"] == rows]
        agreed = {path for case in same for path in case["disagreement"]} - barred.keys()
        complete = [path for path in agreed if all(path in case["milliseconds"] for case in same)]
        if complete:
            by_rows[rows] = {path: sum(case["milliseconds"][path]["median"] for case in same) for path in complete}
    return [[None if below == math.inf else below, path] for below, path in fastest(by_rows)]


def winner(block: dict[str, Any], rows: float) -> str | None:
    """Return the path that won training with so many rows of an expert; ``None`` where nothing was measured."""
    return next((path for below, path in table(block, "training") if below is None or rows < below), None)
