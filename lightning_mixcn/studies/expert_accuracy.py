"""Accuracy on benchmarks without each expert: the parts put together, and written as a table, a picture and a ranking.

Legend: L layers, E experts, V variants (mode and expert) of a layer, R requests, D documents of a task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .disabled_expert import DisabledExpert
from .expert_figures import save_heatmaps
from .expert_report import MODE_TITLES, RANKED
from .expert_results import BatchParts
from .expert_tasks import ExpertTasks
from .significance import PairedTest, paired_test
from .study_tables import write_csv


@dataclass(frozen=True)
class TaskAccuracy:
    """A task or group, as the model is and without each expert.

    Args:
        name: Of the task or group.
        metric: The harness's name of it.
        base: float64 ``[D]``, score of each document.
        disabled: Of each layer and variant, in the order of the layers, compared with ``base``.
    """

    name: str
    metric: str
    base: NDArray[np.float64]
    disabled: list[PairedTest]

    def changes(self) -> NDArray[np.float64]:
        """Change of the accuracy, ``[L·V]``."""
        return np.array([test.difference for test in self.disabled])


def task_accuracies(tasks: ExpertTasks, parts: Sequence[BatchParts]) -> list[TaskAccuracy]:
    """Put the scores of all batches together and let the harness judge them.

    Args:
        tasks: What was asked.
        parts: What `RequestScores` gave of each batch.
    """
    base_R = np.full(len(tasks.requests), math.nan)
    for part in parts:
        base_R[part.evaluated["request"]] = part.evaluated["scores"]
    base = tasks.accuracies(base_R)
    tests: dict[tuple[str, str], list[PairedTest]] = {key: [] for key in base}
    for layer in tqdm(range(len(parts[0].disabled)), desc="judging answers", unit="layer", delay=1):
        for variant in range(len(parts[0].disabled[layer]["scores"])):
            scores_R = base_R.copy()
            for part in parts:
                scores_R[part.evaluated["request"]] = part.disabled[layer]["scores"][variant]
            for key, scores_D in tasks.accuracies(scores_R).items():
                tests[key].append(paired_test(base[key], scores_D))
    return [TaskAccuracy(*key, scores_D, tests[key]) for key, scores_D in base.items()]


def base_accuracies(accuracies: Sequence[TaskAccuracy]) -> dict[str, dict[str, Any]]:
    """By task or group the accuracies of the model as it is, and the number of documents."""
    found: dict[str, dict[str, Any]] = {}
    for part in accuracies:
        found.setdefault(part.name, {"documents": len(part.base)})[part.metric] = float(part.base.mean())
    return found


def write_accuracies(
    folder: Path, accuracies: Sequence[TaskAccuracy], variants: Sequence[DisabledExpert], names: Sequence[str]
) -> str:
    """Write ``accuracy.csv`` and ``accuracy.png``.

    Args:
        folder: Where to.
        accuracies: Of all tasks and groups.
        variants: What was disabled in each layer.
        names: Tasks and groups that are drawn and ranked.

    Returns:
        The ranking.
    """
    num_layers = len(accuracies[0].disabled) // len(variants)
    places = [(layer, variant) for layer in range(num_layers) for variant in variants]
    write_csv(folder / "accuracy.csv", (line for part in accuracies for line in _lines(part, places)))
    shown = [part for part in accuracies if part.name in names and part.metric == "acc"]
    modes = list(dict.fromkeys(variant.mode for variant in variants))
    panels = {}
    for mode in modes:
        of_mode = [place for place, variant in enumerate(variants) if variant.mode == mode]
        for part in shown:
            lost_LE = -part.changes().reshape(num_layers, -1)[:, of_mode]
            panels[f"{part.name}, {MODE_TITLES[mode]}"] = lost_LE
    save_heatmaps(
        folder / "accuracy.png", panels, len(shown), "accuracy that a disabled expert takes away", "accuracy lost"
    )
    return "\n".join(_ranking(part, mode, places) for mode in modes for part in shown)


def _lines(part: TaskAccuracy, places: Sequence[tuple[int, DisabledExpert]]) -> list[dict[str, Any]]:
    base = float(part.base.mean())
    return [
        {
            "layer": layer,
            "expert": variant.expert,
            "mode": variant.mode,
            "task": part.name,
            "metric": part.metric,
            "documents": test.documents,
            "accuracy_base": base,
            "accuracy_disabled": base + test.difference,
            "accuracy_change": test.difference,
            "change_standard_error": test.standard_error,
            "p_value": test.p_value,
        }
        for (layer, variant), test in zip(places, part.disabled, strict=True)
    ]


def _ranking(part: TaskAccuracy, mode: str, places: Sequence[tuple[int, DisabledExpert]]) -> str:
    mine = [place for place, (_, variant) in enumerate(places) if variant.mode == mode]
    best = sorted(mine, key=lambda place: part.disabled[place].difference)[:RANKED]
    lines = [f"accuracy on {part.name} without an expert ({mode}), {part.base.mean():.4f} with all"]
    lines.append("  layer expert    change   p of a paired test (McNemar exact)")
    for place in best:
        (layer, variant), test = places[place], part.disabled[place]
        lines.append(f"  {layer:5} {variant.expert:6}  {test.difference:+8.4f}   {test.p_value:.3g}")
    return "\n".join(lines) + "\n"
