"""Groups of tasks by language: their names in the harness, their languages, and the table in the docs."""

from functools import lru_cache
from pathlib import Path

import pytest

from lightning_mixcn.studies.benchmarks.report import language_of
from lightning_mixcn.studies.tables import markdown_table
from lightning_mixcn.studies.tasks import language_groups, load_benchmarks, split_names, task_manager
from tests.studies.benchmark_data import HARNESS_WARNINGS, harness

pytestmark = pytest.mark.filterwarnings(HARNESS_WARNINGS)
DOCS = Path(__file__).parents[2] / "docs/studies/evaluate.md"
# Columns of the table: a pattern of the tasks of a family, which all are in the index under one name a language.
FAMILIES = {
    "MMLU-ProX": "mmlu_prox_*",
    "Global-MMLU": "global_mmlu_*",
    "INCLUDE": "include_base_44_*",
    "Belebele": "belebele_*",
    "XCOPA": "xcopa_*",
    "XStoryCloze": "xstorycloze_*",
    "XWinograd": "xwinograd_*",
    "MGSM": "mgsm_native_cot_*",
}


@lru_cache(maxsize=1)
def index() -> frozenset[str]:
    """Return all names of the harness; reading them takes 10 to 20 s."""
    harness()
    return frozenset(task_manager().all_tasks)


def table(known: frozenset[str] | None) -> str:
    """Return the table of the docs; a cell is yes if the group has a task of the family."""
    lines = [["group", "language", *FAMILIES, "national"]]
    for name, group in language_groups().items():
        cells, rest = [], list(group.tasks)
        for pattern in FAMILIES.values():
            of_family = [task for task in rest if task.startswith(pattern[:-1])]
            rest = [task for task in rest if task not in of_family]
            assert len(of_family) < 2
            assert known is None or set(of_family) <= known
            cells.append("yes" if of_family else "-")
        lines.append([f"`{name}`", group.language, *cells, ", ".join(f"`{task}`" for task in rest) or "-"])
    return markdown_table(lines)


def test_a_group_is_replaced_by_its_tasks() -> None:
    assert split_names(["chinese"])[:3] == ["ceval-valid", "cmmlu", "tmmluplus"]
    assert split_names(["gsm8k,thai"]) == ["gsm8k", *language_groups()["thai"].tasks]
    assert not {*split_names(["chinese"])} & {*split_names(["english"])}
    with pytest.raises(ValueError, match="'cmmlu' twice"):
        split_names(["chinese,cmmlu"])


def test_no_task_is_in_two_groups_and_each_has_its_language() -> None:
    names = [task for group in language_groups().values() for task in group.tasks]
    assert len(names) == len({*names})
    for group in language_groups().values():
        assert {language_of(task) for task in group.tasks} == {group.language}
    assert [language_of(task) for task in ("mmlu_prox_ja_biology", "kmmlu_stem", "mmlu_prox_fi")] == [
        "ja",
        "ko",
        "other",
    ]


def test_the_docs_have_the_table() -> None:
    assert table(None) in DOCS.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_name_is_the_harnesses() -> None:
    known = index()
    missing = [task for group in language_groups().values() for task in group.tasks if task not in known]
    assert not missing
    assert not {*language_groups()} & known  # a group by language hides no task
    assert table(known) in DOCS.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_has_all_that_the_index_has() -> None:
    """Of the families, in these languages: no task is left out of a group."""
    known = index()
    for group in language_groups().values():
        for pattern in FAMILIES.values():
            code = "jp" if (group.language, pattern) == ("ja", "xwinograd_*") else group.language
            task = pattern.replace("*", code)
            if task in known:
                assert task in group.tasks


@pytest.mark.slow
def test_another_name_is_refused_with_the_groups() -> None:
    index()
    with pytest.raises(ValueError, match=r"no task 'chinse'\. Did you mean .*chinese"):
        load_benchmarks(["chinse"])
    with pytest.raises(ValueError, match=r"Groups by language here are chinese, english, japanese"):
        load_benchmarks(["help"])
