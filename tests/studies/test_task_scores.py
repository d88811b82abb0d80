"""Scores of tasks: an oracle, chance, the harness's own run of the same, and paired tests."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.studies.significance import mcnemar_p
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.task_scores import (
    compare_tasks,
    group_metrics,
    metric_keys,
    run_task,
    standard_error,
)
from lightning_mixcn.studies.tasks import Benchmarks, load_benchmarks
from tests.studies.benchmark_data import HARNESS_WARNINGS, few_tasks, real_files, write_ceval, write_hellaswag
from tests.studies.benchmarks.harness_oracle import chance, fake_model, oracle

pytestmark = pytest.mark.filterwarnings(HARNESS_WARNINGS)
REAL = ["ceval-valid_law", "cmmlu_agronomy", "mmlu_anatomy", "hellaswag"]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = few_tasks()
    monkeypatch.setattr(benchmark_tasks, "task_manager", lambda: found)
    return found


@pytest.fixture
def benchmarks(tmp_path: Path) -> Benchmarks:
    return load_benchmarks(["ceval_two"], files=BenchmarkFiles(write_ceval(tmp_path)))


def real_benchmarks(folder: Path) -> Benchmarks:
    for name in ("ceval.zip", "cmmlu.zip", "mmlu.zip"):
        (folder / name).symlink_to(real_files() / name)
    return load_benchmarks(REAL, num_fewshot=0, files=BenchmarkFiles(write_hellaswag(folder, items=200)))


def test_an_oracle_scores_one_and_a_random_model_chance(tmp_path: Path) -> None:
    """On C-Eval, CMMLU, MMLU and HellaSwag as they are; all have four choices."""
    benchmarks = real_benchmarks(tmp_path)
    right = total = 0.0
    for name in REAL:
        scores, _ = run_task(oracle(), benchmarks, name)
        assert scores["metrics"]["acc,none"] == 1.0
        drawn = run_task(chance(), benchmarks, name)[0]["documents"]["none"]["metrics"]["acc"]
        right, total = right + sum(drawn), total + len(drawn)
    assert total > 500
    assert right / total == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / total) ** 0.5)


def test_it_is_what_the_harness_gives_by_itself(benchmarks: Benchmarks, tmp_path: Path, few: Any) -> None:
    import lm_eval

    scores = {name: run_task(oracle_with_errors(), benchmarks, name, limit=30)[0] for name in benchmarks.tasks}
    again = load_benchmarks(["ceval_two"], files=BenchmarkFiles(tmp_path))
    tasks = [again.groups["ceval_two"]]
    by_hand = lm_eval.simple_evaluate(oracle_with_errors(), tasks=tasks, limit=30, task_manager=few)["results"]
    for name, part in scores.items():
        assert 0 < part["metrics"]["acc,none"] < 1
        assert part["metrics"] == {key: value for key, value in by_hand[name].items() if key not in ("name", "alias")}
    grouped = group_metrics(benchmarks, scores)["ceval_two"]
    assert grouped == {key: value for key, value in by_hand["ceval_two"].items() if key not in ("name", "alias")}
    assert metric_keys(grouped) == [("acc", "none")]
    assert standard_error(grouped, "acc", "none") == by_hand["ceval_two"]["acc_stderr,none"]


def oracle_with_errors() -> Any:
    knows = oracle()
    return fake_model(
        lambda request: knows.loglikelihood([request])[0][0] * (-1 if request.doc["question"].endswith("3?") else 1)
    )


def test_documents_are_paired_over_all_tasks_of_a_group(benchmarks: Benchmarks) -> None:
    first = {name: run_task(chance(1), benchmarks, name)[0] for name in benchmarks.tasks}
    second = {name: run_task(chance(2), benchmarks, name)[0] for name in benchmarks.tasks}
    tasks = list(benchmarks.tasks)
    found = compare_tasks(first, second, tasks, "acc", "none")
    assert found is not None
    ones, twos = (
        [x for name in tasks for x in part[name]["documents"]["none"]["metrics"]["acc"]] for part in (first, second)
    )
    assert found.documents == 80
    assert found.p_value == mcnemar_p(np.array(ones), np.array(twos))
    assert found.difference == pytest.approx(np.mean(twos) - np.mean(ones))


def test_other_documents_are_not_compared(benchmarks: Benchmarks) -> None:
    (name, *_) = benchmarks.tasks
    all_of_it, ten = ({name: run_task(oracle(), benchmarks, name, limit=limit)[0]} for limit in (None, 10))
    assert compare_tasks(all_of_it, ten, [name], "acc", "none") is None
    assert compare_tasks(ten, ten, [name], "no such metric", "none") is None


def test_random_numbers_go_on_as_if_nothing_had_been(benchmarks: Benchmarks) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    run_task(chance(), benchmarks, "ceval-valid_law", limit=2)
    assert draw() == expected
