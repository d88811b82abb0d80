"""Rows and tables: what is compared, and what is shown."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_mixcn.studies.benchmarks.report import (
    language_of,
    parse_languages,
    score_table,
    shown_rows,
    task_rows,
    with_error,
)
from lightning_mixcn.studies.task_scores import TaskScores
from lightning_mixcn.studies.tasks import Benchmarks

SCORES = {"one": ([1, 0, 0, 1], [1, 1, 1, 1]), "two": ([0, 0], [1, 0])}


def task_scores(values: list[int], *, cut: int = 0) -> TaskScores:
    mean = sum(values) / len(values)
    return {
        "metrics": {
            "acc,none": mean, "acc_stderr,none": 0.1, "text,none": "no number", "ppl,none": 7.5,
            "sample_len": len(values),
        },
        "documents": {
            "none": {
                "documents": [str(number) for number in range(len(values))],
                "metrics": {"acc": list(map(float, values)), "ppl": [1.0] * len(values)},
            }
        },
        "version": "1",
        "shots": 5,
        "higher_is_better": {"acc": True},
        "prompts_cut": cut,
    }  # fmt: skip


class FakeGroup:
    """A group as the harness has it, that averages over documents."""

    has_aggregation = True
    aggregate_metric_list = (SimpleNamespace(metric="acc", weight_by_size=True),)

    def get_all_tasks(self) -> list[Any]:
        return [SimpleNamespace(task_name=name) for name in SCORES]

    def aggregate(self, metrics: dict[str, Any]) -> dict[str, Any]:
        sizes = {name: metrics[name]["sample_len"] for name in SCORES}
        total = sum(sizes.values())
        return {
            "acc,none": sum(metrics[n]["acc,none"] * size for n, size in sizes.items()) / total,
            "sample_len": total,
        }


@pytest.fixture
def benchmarks() -> Benchmarks:
    return Benchmarks(("mmlu", "one"), dict.fromkeys(SCORES), {"mmlu": FakeGroup()})


@pytest.fixture
def models() -> dict[str, dict[str, TaskScores]]:
    return {
        model: {name: task_scores(pair[place], cut=3 * place) for name, pair in SCORES.items()}
        for place, model in enumerate(("base", "adapted"))
    }


def test_rows(benchmarks: Benchmarks, models: dict[str, dict[str, TaskScores]]) -> None:
    rows = {(row["task"], row["metric"]): row for row in task_rows(benchmarks, models, {"one": "th"})}
    group = rows["mmlu", "acc"]
    assert group["scores"] == {"base": pytest.approx(2 / 6), "adapted": pytest.approx(5 / 6)}
    assert group["difference"] == pytest.approx(0.5)
    assert group["test"] == "mcnemar"
    assert group["p_value"] == pytest.approx(2 / 2**3)  # three won, none lost
    assert (group["language"], rows["one", "acc"]["language"], rows["two", "acc"]["language"]) == ("en", "th", "other")
    assert group["prompts_cut"] == 6
    assert rows["one", "acc"]["p_value"] == pytest.approx(2 / 2**2)
    # A figure that is no mean of the documents' scores is not tested by them.
    assert (rows["one", "ppl"]["difference"], rows["one", "ppl"]["scores"]["base"]) == (0.0, 7.5)
    assert ("one", "text") not in rows


def test_a_figure_that_is_no_mean_of_its_documents_has_no_test(
    benchmarks: Benchmarks, models: dict[str, dict[str, TaskScores]]
) -> None:
    models["adapted"]["one"]["metrics"]["ppl,none"] = 6.0
    rows = {(row["task"], row["metric"]): row for row in task_rows(benchmarks, models, {})}
    assert (rows["one", "ppl"]["difference"], rows["one", "ppl"]["p_value"]) == (-1.5, None)


def test_the_table_shows_groups_and_what_was_asked_for(
    benchmarks: Benchmarks, models: dict[str, dict[str, TaskScores]]
) -> None:
    rows = shown_rows(benchmarks, task_rows(benchmarks, models, {"one": "zh"}))
    assert {row["task"] for row in rows} == {"mmlu", "one"}
    lines = score_table(rows, ["base", "adapted"]).splitlines()
    assert lines[1] == "[zh]"
    assert lines[2].split() == [
        "one*",
        "acc",
        "5",
        "4",
        "0.5000",
        "±0.1000",
        "1.0000",
        "±0.1000",
        "+0.5000",
        "±0.2887",
        "0.5",
    ]
    assert any(line.startswith("[en]") for line in lines)
    assert "lost their beginning" in lines[-2]


def test_one_model_has_no_difference(benchmarks: Benchmarks, models: dict[str, dict[str, TaskScores]]) -> None:
    rows = task_rows(benchmarks, {"model": models["base"]}, {})
    assert all(row["difference"] is None and row["p_value"] is None for row in rows)
    table = score_table(rows, ["model"])
    assert "difference" not in table
    assert "paired" not in table


def test_figures_with_errors() -> None:
    assert with_error(None, 0.1) == "-"
    assert with_error(0.5, float("nan"), signed=True) == "+0.5000"


@pytest.mark.parametrize(
    ("task", "language"),
    [
        ("ceval-valid", "zh"),
        ("ceval-valid_law", "zh"),
        ("cmmlu_agronomy", "zh"),
        ("xcopa_zh", "zh"),
        ("mmlu_anatomy", "en"),
        ("mmlu_prox_zh", "zh"),
        ("mmlu_prox_de", "de"),
        ("global_mmlu_full_zh", "zh"),
        ("belebele_zho_Hans", "zh"),
        ("hellaswag", "en"),
        ("arc_challenge", "en"),
        ("gsm8k_cot", "en"),
        ("winogrande", "en"),
        ("truthfulqa_mc2", "en"),
        ("longbench_multifieldqa_zh", "zh"),
        ("longbench_dureader", "zh"),
        ("longbench_gov_report", "en"),
        ("agieval_gaokao_physics", "zh"),
        ("agieval_gaokao_english", "en"),
        ("thai_exam", "other"),
    ],
)
def test_families(task: str, language: str) -> None:
    assert language_of(task) == language


def test_the_table_can_be_extended_and_overruled() -> None:
    more = parse_languages(["thai_*=th", "gsm8k=maths"])
    assert [language_of(task, more) for task in ("thai_exam", "gsm8k", "mmlu")] == ["th", "maths", "en"]


@pytest.mark.parametrize("entry", ["thai_*", "=th", "thai_*="])
def test_bad_entries_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="pattern=language"):
        parse_languages([entry])
