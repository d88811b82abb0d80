"""One task run by lm-evaluation-harness: its own figures, and each document's score for paired tests."""

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, TypedDict

import numpy as np
import torch

from lightning_mixcn.studies.processes import is_first
from lightning_mixcn.studies.significance import PairedTest, paired_test

from .tasks import Benchmarks, harness_messages

# The columns of the harness's table that are no metric.
_NO_METRIC = ("name", "alias", "sample_len", "sample_count")


class TaskDocumentScores(TypedDict):
    """Scores of a task's documents under one of its answer filters.

    Args:
        documents: Number and content hash of each document.
        metrics: Scores of each document, by name; those that are one number.
    """

    documents: list[str]
    metrics: dict[str, list[float]]


class TaskScores(TypedDict):
    """What is kept of one task, as JSON has it.

    Args:
        metrics: The harness's results: ``acc,none``, ``acc_stderr,none``, … (metric, comma, answer filter).
        documents: By answer filter.
        version: Version of the task's definition.
        shots: Examples in a prompt.
        higher_is_better: By metric.
        prompts_cut: Prompts that were longer than the model reads, and lost their beginning.
    """

    metrics: dict[str, Any]
    documents: dict[str, TaskDocumentScores]
    version: str
    shots: int
    higher_is_better: dict[str, Any]
    prompts_cut: int


def run_task(
    lm: Any, benchmarks: Benchmarks, name: str, *, limit: float | None = None, apply_chat_template: bool = False
) -> tuple[TaskScores, list[dict[str, Any]]]:
    """Run a task as `lm_eval.simple_evaluate` runs it, with the same seeds.

    Args:
        lm: A model as the harness takes one (`lm_eval.api.model.LM`).
        benchmarks: Benchmarks that have the task.
        name: Name of the task; not a group.
        limit: Its first documents only, so many, or this share of them if less than 1.
        apply_chat_template: Write prompts as conversations, with the tokenizer's template.

    Returns:
        What is kept, and the harness's own log of every document.
    """
    from lm_eval.evaluator import evaluate

    task = benchmarks.tasks[name]
    with harness_messages() as messages, harness_seeds(task), _short_bars():
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}},
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
        )
    samples: list[dict[str, Any]] = found["samples"][name]
    scores: TaskScores = {
        "metrics": {key: value for key, value in found["results"][name].items() if key not in ("name", "alias")},
        "documents": _documents(samples),
        "version": str(found["versions"][name]),
        "shots": benchmarks.shots[name],
        "higher_is_better": dict(found["higher_is_better"][name]),
        "prompts_cut": messages.prompts_cut,
    }
    return scores, samples


def group_metrics(benchmarks: Benchmarks, scores: Mapping[str, TaskScores]) -> dict[str, dict[str, Any]]:
    """Return the harness's own aggregation of each group's tasks; only of groups that it aggregates.

    Args:
        benchmarks: The groups.
        scores: Scores of all tasks, by name.
    """
    metrics = {name: {"name": name, "alias": name, **part["metrics"]} for name, part in scores.items()}
    with harness_messages():
        return {
            name: {key: value for key, value in group.aggregate(metrics).items() if key not in ("name", "alias")}
            for name, group in benchmarks.groups.items()
            if group.has_aggregation
        }


def metric_keys(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return metric and answer filter of each figure of a task or group, standard errors left out."""
    keys = [key.partition(",") for key in metrics if key not in _NO_METRIC]
    return [(metric, answer) for metric, comma, answer in keys if comma and not metric.endswith("_stderr")]


def standard_error(metrics: Mapping[str, Any], metric: str, answer: str) -> float | None:
    """Return the harness's standard error of a figure; ``None`` where it gives none."""
    value = metrics.get(f"{metric}_stderr,{answer}")
    return float(value) if isinstance(value, int | float) else None


def compare_tasks(
    first: Mapping[str, TaskScores], second: Mapping[str, TaskScores], tasks: list[str], metric: str, answer: str
) -> PairedTest | None:
    """Test the difference of two models over the same documents of some tasks.

    Args:
        first: Scores of one model's tasks.
        second: Scores of the other's.
        tasks: Whose documents.
        metric: Whose scores.
        answer: Answer filter.

    Returns:
        The test; ``None`` where a document's score is not one number, or the documents are not the same.
    """
    ones: list[float] = []
    twos: list[float] = []
    for name in tasks:
        parts = [scores[name]["documents"].get(answer) for scores in (first, second)]
        if not all(part and metric in part["metrics"] for part in parts):
            return None
        one, two = (part for part in parts if part is not None)
        if one["documents"] != two["documents"]:
            return None
        ones += one["metrics"][metric]
        twos += two["metrics"][metric]
    if not ones or not (np.isfinite(ones).all() and np.isfinite(twos).all()):
        return None
    return paired_test(ones, twos)


def _documents(samples: list[dict[str, Any]]) -> dict[str, TaskDocumentScores]:
    found: dict[str, TaskDocumentScores] = {}
    for answer in dict.fromkeys(str(sample["filter"]) for sample in samples):
        mine = sorted((sample for sample in samples if sample["filter"] == answer), key=lambda one: one["doc_id"])
        names = dict.fromkeys(name for sample in mine for name in sample["metrics"])
        numeric = [name for name in names if all(_is_number(sample.get(name)) for sample in mine)]
        found[answer] = {
            "documents": [f"{sample['doc_id']}:{sample['doc_hash'][:16]}" for sample in mine],
            "metrics": {name: [float(sample[name]) for sample in mine] for name in numeric},
        }
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)


@contextmanager
def harness_seeds(task: Any) -> Iterator[None]:
    """Set the harness's default seeds; afterwards the process's random numbers go on as if nothing had been."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # The legacy state is what the harness seeds, and what the tasks' code draws from.
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextmanager
def _short_bars() -> Iterator[None]:
    """Let the harness's progress bars, three a task, appear on rank 0 only, where they last, and go when done."""
    modules = [import_module(f"lm_eval.{name}") for name in ("api.task", "api.model", "models.huggingface")]
    bars = [(module, module.tqdm) for module in modules if hasattr(module, "tqdm")]
    for module, bar in bars:
        vars(module)["tqdm"] = partial(bar, leave=False, delay=2 if is_first() else math.inf)
    try:
        yield
    finally:
        for module, bar in bars:
            vars(module)["tqdm"] = bar
