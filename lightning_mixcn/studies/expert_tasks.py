"""Multiple choice of lm-evaluation-harness as requests that can be scored again and again.

The harness writes the prompts, cuts them into tokens and judges the likelihoods; only the likelihoods are computed
elsewhere.

Legend: R requests of all tasks, D documents.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_mixcn.text import TextTokenizer

from .benchmark_report import weighted_metrics
from .benchmark_scores import harness_seeds
from .benchmark_tasks import Benchmarks, harness_messages
from .request_scores import Request

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
        """What the harness makes of the likelihoods, out of `METRICS`."""
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
        names: What was asked for: tasks, groups or tags.
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

        from .request_tokens import RequestTokens

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
            raise ValueError(
                f"`tasks`: {name!r} is of type {task.OUTPUT_TYPE}, but accuracy without an expert is measured for "
                "multiple choice only. Leave it out"
            )


def _groups(benchmarks: Benchmarks) -> dict[str, list[str]]:
    """Groups whose accuracy is the mean over all their documents."""
    return {
        name: [task.task_name for task in group.get_all_tasks()]
        for name, group in benchmarks.groups.items()
        if group.has_aggregation and "acc" in weighted_metrics(group)
    }
