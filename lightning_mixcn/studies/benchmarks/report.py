"""Scores of one or two models beside each other: rows for JSON, and a table by language to read."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypedDict

from lightning_mixcn.errors import UserError
from lightning_mixcn.studies.tables import aligned
from lightning_mixcn.studies.task_scores import (
    TaskScores,
    compare_tasks,
    group_metrics,
    metric_keys,
    standard_error,
)
from lightning_mixcn.studies.tasks import Benchmarks, language_groups, weighted_metrics

OTHER = "other"

# The first pattern that fits decides, so exceptions stand before the families that they belong to.
LANGUAGES: dict[str, str] = {
    "*_zh": "zh",
    "*_zh_*": "zh",
    "*_zho_*": "zh",
    "*_cmn_*": "zh",
    "*-zh": "zh",
    "ceval*": "zh",
    "cmmlu*": "zh",
    "aclue*": "zh",
    "agieval_gaokao_english": "en",
    "agieval_gaokao*": "zh",
    "agieval_cn": "zh",
    "agieval_jec*": "zh",
    "tmmluplus*": "zh",
    "tmlu*": "zh",
    "zhoblimp*": "zh",
    "longbench_dureader*": "zh",
    "longbench_lsht*": "zh",
    "longbench_vcsum*": "zh",
    "*_en": "en",
    "*_en_*": "en",
    "*_eng_*": "en",
    "*-en": "en",
    "mmlu_prox*": OTHER,
    "mmlu*": "en",
    "blimp": "en",
    "copa": "en",
    "hellaswag": "en",
    "arc_challenge": "en",
    "arc_easy": "en",
    "ai2_arc": "en",
    "winogrande": "en",
    "truthfulqa_mc*": "en",
    "truthfulqa_gen": "en",
    "truthfulqa": "en",
    "gsm8k*": "en",
    "piqa": "en",
    "openbookqa": "en",
    "boolq": "en",
    "sciq": "en",
    "lambada*": "en",
    "bbh*": "en",
    "triviaqa": "en",
    "nq_open": "en",
    "race": "en",
    "agieval*": "en",
    "longbench_*": "en",
    "leaderboard*": "en",
    "ifeval": "en",
    "wikitext": "en",
    "drop": "en",
}


def parse_languages(entries: Sequence[str]) -> dict[str, str]:
    """Read ``pattern=language`` entries.

    Args:
        entries: E.g. ``xnli_vi=vi`` or ``thai_*=th``; ``*`` is anything.

    Raises:
        ValueError: an entry without a pattern or a language.
    """
    found = {}
    for entry in entries:
        pattern, _, language = entry.partition("=")
        if not (pattern and language):
            raise UserError(f"`languages` has {entry!r}: expected pattern=language, e.g. xnli_vi=vi")
        found[pattern] = language
    return found


def language_of(task: str, more: Mapping[str, str] | None = None) -> str:
    """Return the language of a task.

    Args:
        task: Name of a task or group.
        more: Patterns that come before those of this file.

    Returns:
        A short name such as ``zh``, or ``other``.
    """
    for pattern, language in {**(more or {}), **_of_groups(), **LANGUAGES}.items():
        if fnmatchcase(task, pattern):
            return language
    return OTHER


def _of_groups() -> dict[str, str]:
    """Return the languages of the tasks in the groups by language; those in English have patterns of their own."""
    named = {task: group.language for group in language_groups().values() for task in group.tasks}
    return {
        pattern: language for task, language in named.items() if language != "en" for pattern in (task, f"{task}_*")
    }


Models = Mapping[str, Mapping[str, TaskScores]]


class ScoreRow(TypedDict):
    """One figure of a task or group.

    Args:
        task: Name of the task or group.
        language: See `task_languages`.
        metric: The harness's name of it.
        filter: The harness's answer filter; ``none`` where there is nothing to choose.
        shots: Examples in a prompt; ``None`` for a group whose tasks differ.
        documents: Number of scored documents.
        prompts_cut: Prompts that lost their beginning, of the model for which they were most.
        scores: By model.
        standard_errors: By model, the harness's.
        difference: Second model less the first; ``None`` for one model.
        difference_standard_error: From the documents' differences.
        p_value: P value of the paired test.
        test: ``mcnemar`` or ``permutation``; ``None`` where scores are no means over documents.
    """

    task: str
    language: str
    metric: str
    filter: str
    shots: int | None
    documents: int
    prompts_cut: int
    scores: dict[str, float]
    standard_errors: dict[str, float | None]
    difference: float | None
    difference_standard_error: float | None
    p_value: float | None
    test: str | None


def task_rows(benchmarks: Benchmarks, models: Models, languages: Mapping[str, str]) -> list[ScoreRow]:
    """Return rows of all tasks and of the groups that the harness aggregates, groups first.

    Args:
        benchmarks: Benchmarks that were run.
        models: Scores of every task, by model; the first is compared with the second.
        languages: Patterns beside the usual ones.
    """
    grouped = {model: group_metrics(benchmarks, scores) for model, scores in models.items()}
    first = next(iter(models))
    rows = []
    for name in grouped[first]:
        tasks = [task.task_name for task in benchmarks.groups[name].get_all_tasks()]
        metrics = {model: grouped[model][name] for model in models}
        rows += _rows(name, tasks, metrics, models, languages, weighted_metrics(benchmarks.groups[name]))
    for name in benchmarks.tasks:
        metrics = {model: scores[name]["metrics"] for model, scores in models.items()}
        rows += _rows(name, [name], metrics, models, languages, None)
    return rows


def shown_rows(benchmarks: Benchmarks, rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Choose a table's rows: groups instead of their tasks, tasks in no aggregated group, and those asked for."""
    aggregated = {row["task"] for row in rows} & benchmarks.groups.keys()
    inside = {task.task_name for name in aggregated for task in benchmarks.groups[name].get_all_tasks()}
    return [row for row in rows if row["task"] not in inside or row["task"] in benchmarks.names]


def score_table(rows: Sequence[ScoreRow], models: Sequence[str]) -> str:
    """Return a table by language, Chinese and English first.

    Args:
        rows: Rows to show.
        models: Names of the models.
    """
    head = ["task", "metric", "shots", "documents", *models, *(["difference", "p"] if len(models) > 1 else [])]
    lines: list[list[str]] = [head]
    order = {"zh": 0, "en": 1, OTHER: 3}
    for language in sorted({row["language"] for row in rows}, key=lambda name: (order.get(name, 2), name)):
        lines.append([f"[{language}]"])
        lines += [_cells(row, models) for row in rows if row["language"] == language]
    text = aligned(lines)
    if any(row["prompts_cut"] for row in rows):
        text += "\n* prompts were longer than the model reads, and lost their beginning"
    if len(models) > 1:
        text += (
            "\n± standard error; p of a paired test over the same documents (McNemar exact for 0/1, else sign flips)"
        )
    return text


def with_error(value: float | None, error: float | None, *, signed: bool = False) -> str:
    """Return a figure and its standard error, to four places."""
    if value is None:
        return "-"
    shown = f"{value:+.4f}" if signed else f"{value:.4f}"
    return shown if error is None or math.isnan(error) else f"{shown} ±{error:.4f}"


def _rows(
    name: str,
    tasks: list[str],
    metrics: Mapping[str, Mapping[str, Any]],
    models: Models,
    languages: Mapping[str, str],
    weighted: set[str] | None,
) -> list[ScoreRow]:
    first, *others = models
    shots = {models[first][task]["shots"] for task in tasks}
    rows = []
    for metric, answer in metric_keys(metrics[first]):
        values = {model: metrics[model][f"{metric},{answer}"] for model in models}
        if not all(isinstance(value, int | float) for value in values.values()):
            continue
        paired = bool(others) and (weighted is None or metric in weighted)
        test = compare_tasks(models[first], models[others[0]], tasks, metric, answer) if paired else None
        difference = values[others[0]] - values[first] if others else None
        # A metric that is no mean over documents (a perplexity, a corpus's BLEU) is not what was tested.
        if test and difference is not None and not math.isclose(test.difference, difference, abs_tol=1e-6):
            test = None
        rows.append(
            ScoreRow(
                task=name,
                language=language_of(name, languages),
                metric=metric,
                filter=answer,
                shots=shots.copy().pop() if len(shots) == 1 else None,
                documents=int(metrics[first].get("sample_len", 0)),
                prompts_cut=max(sum(models[model][task]["prompts_cut"] for task in tasks) for model in models),
                scores={model: float(value) for model, value in values.items()},
                standard_errors={model: standard_error(metrics[model], metric, answer) for model in models},
                difference=difference,
                difference_standard_error=None
                if test is None or math.isnan(test.standard_error)
                else test.standard_error,
                p_value=test.p_value if test else None,
                test=test.method if test else None,
            )
        )
    return rows


def _cells(row: ScoreRow, models: Sequence[str]) -> list[str]:
    metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
    cells = [
        row["task"] + ("*" if row["prompts_cut"] else ""),
        metric,
        "mixed" if row["shots"] is None else str(row["shots"]),
        str(row["documents"]),
        *(with_error(row["scores"][model], row["standard_errors"][model]) for model in models),
    ]
    if len(models) > 1:
        p_value = row["p_value"]
        cells.append(with_error(row["difference"], row["difference_standard_error"], signed=True))
        cells.append("-" if p_value is None else f"{p_value:.3g}")
    return cells
