"""Accuracy on benchmarks without each expert: the parts put together, and written as a table, a picture and a ranking.

Legend: L layers, E experts, V variants (mode and expert) of a layer, R requests, D documents of a task.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from lightning_mixcn.errors import UserError
from lightning_mixcn.studies.significance import PairedTest, paired_test
from lightning_mixcn.studies.tables import aligned, write_csv
from lightning_mixcn.studies.task_scores import harness_seeds
from lightning_mixcn.studies.tasks import Benchmarks, harness_messages, weighted_metrics
from lightning_mixcn.text import TextTokenizer

from .disabling import DisabledExpert
from .report import MODE_TITLES, RANKED, save_heatmaps
from .requests import Request
from .work import BatchParts

METRICS = ("acc", "acc_norm")


class TaskDocument:
    """A question.

    Args:
        task: The harness's task object.
        doc: The question as the task has it.
        requests: Numbers of its requests, in the task's order.
    """

    def __init__(self, task: Any, doc: Any, requests: Sequence[int]) -> None:
        self._task, self._doc, self._requests = task, doc, list(requests)

    def metrics(self, scores_R: NDArray[np.float64]) -> dict[str, float]:
        """Return the harness's figures of the likelihoods, out of `METRICS`."""
        # Whether a choice is what the model would say itself decides none of these metrics.
        results = [(float(score), False) for score in scores_R[self._requests]]
        return {
            name: float(value)
            for name, value in self._task.process_results(self._doc, results).items()
            if name in METRICS
        }


@dataclass(frozen=True)
class ExpertTasks:
    """Tasks with all their requests.

    Args:
        requests: Tokens of each request's context and continuation.
        documents: By name of the task.
        groups: Names of the tasks of each group that counts all its documents alike.
        names: Names that were asked for: tasks, groups or tags.
    """

    requests: list[Request]
    documents: dict[str, list[TaskDocument]]
    groups: dict[str, list[str]]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, benchmarks: Benchmarks, model: nn.Module, tokenizer: TextTokenizer, limit: float | None
    ) -> "ExpertTasks":
        """Let the harness write the requests.

        Args:
            benchmarks: Checked by `check_multiple_choice`.
            model: For the length that it reads, and whether prompts begin with BOS.
            tokenizer: The model's.
            limit: Documents of each task, the first ones, or this share of them if less than 1.
        """
        from lm_eval.evaluator_utils import get_sample_size

        from lightning_mixcn.studies.harness import RequestTokens

        lm, requests = RequestTokens(model, tokenizer), list[Request]()
        documents: dict[str, list[TaskDocument]] = {}
        for name, task in benchmarks.tasks.items():
            with harness_messages(), harness_seeds(task):
                number = get_sample_size(task, limit)
                task.build_all_requests(limit=number, rank=0, world_size=1)
            by_document: defaultdict[int, list[Any]] = defaultdict(list)
            for place, instance in enumerate(task.instances, start=len(requests)):
                by_document[instance.doc_id].append((instance.idx, place))
            requests += lm.tokens(task.instances)
            documents[name] = [
                TaskDocument(task, doc, [place for _, place in sorted(by_document[index])])
                for index, doc in task.doc_iterator(rank=0, limit=number, world_size=1)
            ]
        return cls(requests, documents, _groups(benchmarks), benchmarks.names)

    @property
    def shown(self) -> list[str]:
        """Groups that were asked for, and tasks that are in none of them."""
        groups = {name: part for name, part in self.groups.items() if name in self.names}
        inside = {task for part in groups.values() for task in part}
        return [*groups, *(name for name in self.documents if name not in inside or name in self.names)]

    def accuracies(self, scores_R: NDArray[np.float64]) -> dict[tuple[str, str], NDArray[np.float64]]:
        """Judge the likelihoods.

        Args:
            scores_R: Log-likelihood of each request.

        Returns:
            Score of each document float64 ``[D]``, by name of the task or group and metric; a metric that some document
            does not have is left out.
        """
        found = {name: [document.metrics(scores_R) for document in part] for name, part in self.documents.items()}
        found |= {group: [one for name in names for one in found[name]] for group, names in self.groups.items()}
        return {
            (name, metric): np.array([metrics[metric] for metrics in part])
            for name, part in found.items()
            for metric in METRICS
            if all(metric in metrics for metrics in part)
        }


def check_multiple_choice(benchmarks: Benchmarks) -> None:
    """Raise ValueError for a task whose answers are not chosen by likelihood."""
    for name, task in benchmarks.tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(
                f"`tasks`: {name!r} is of type {task.OUTPUT_TYPE}, but accuracy without an expert is measured for "
                "multiple choice only. Leave it out"
            )


def _groups(benchmarks: Benchmarks) -> dict[str, list[str]]:
    """Return the groups whose accuracy is the mean over all their documents."""
    return {
        name: [task.task_name for task in group.get_all_tasks()]
        for name, group in benchmarks.groups.items()
        if group.has_aggregation and "acc" in weighted_metrics(group)
    }


@dataclass(frozen=True)
class TaskAccuracy:
    """A task or group, as the model is and without each expert.

    Args:
        name: Name of the task or group.
        metric: The harness's name of it.
        base: float64 ``[D]``, score of each document.
        disabled: Comparison with ``base`` of each layer and variant, in the order of the layers.
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
        tasks: Tasks that were asked.
        parts: Results of `RequestScores` for each batch.
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
    """Return by task or group the accuracies of the unchanged model, and the number of documents."""
    found: dict[str, dict[str, Any]] = {}
    for part in accuracies:
        found.setdefault(part.name, {"documents": len(part.base)})[part.metric] = float(part.base.mean())
    return found


def write_accuracies(
    folder: Path, accuracies: Sequence[TaskAccuracy], variants: Sequence[DisabledExpert], names: Sequence[str]
) -> str:
    """Write ``accuracy.csv`` and ``accuracy.png``.

    Args:
        folder: Folder to write to.
        accuracies: Accuracies of all tasks and groups.
        variants: Experts that were disabled in each layer.
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
    lines = [["layer", "expert", "change", "p of a paired test (McNemar exact)"]]
    for place in best:
        (layer, variant), test = places[place], part.disabled[place]
        lines.append([str(layer), str(variant.expert), f"{test.difference:+.4f}", f"{test.p_value:.3g}"])
    title = f"accuracy on {part.name} without an expert ({mode}), {part.base.mean():.4f} with all"
    return f"{title}\n{aligned(lines, left=(3,))}\n"
