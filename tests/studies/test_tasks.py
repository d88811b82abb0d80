"""Tasks found by name, and what is refused before any model is loaded."""

import importlib.util
import logging
from pathlib import Path

import pytest

from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.tasks import (
    harness_messages,
    load_benchmarks,
    require_harness,
    split_names,
)
from tests.studies.benchmark_data import HARNESS_WARNINGS, few_tasks, write_ceval

pytestmark = pytest.mark.filterwarnings(HARNESS_WARNINGS)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchmarkFiles:
    few = few_tasks()
    monkeypatch.setattr(benchmark_tasks, "task_manager", lambda: few)
    return BenchmarkFiles(write_ceval(tmp_path))


def test_without_the_harness_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lightning_mixcn\[eval\]'"):
        require_harness()


def test_names_are_split_at_commas() -> None:
    assert split_names(["mmlu, arc_easy", "gsm8k"]) == ["mmlu", "arc_easy", "gsm8k"]
    with pytest.raises(ValueError, match="is empty"):
        split_names([",", ""])
    with pytest.raises(ValueError, match="'mmlu' twice"):
        split_names(["mmlu,mmlu"])


def test_a_group_is_its_tasks(files: BenchmarkFiles) -> None:
    found = load_benchmarks(["ceval_two"], num_fewshot=3, files=files)
    assert found.shots == {"ceval-valid_law": 3, "ceval-valid_accountant": 3}
    assert list(found.groups) == ["ceval_two"]


def test_shots_are_the_task_s_own(files: BenchmarkFiles) -> None:
    assert load_benchmarks(["ceval-valid_law"], files=files).shots == {"ceval-valid_law": 0}


def test_unknown_tasks_are_refused_with_close_names(files: BenchmarkFiles) -> None:
    with pytest.raises(ValueError, match=r"no task 'ceval_law'\. Did you mean .*ceval-valid_law"):
        load_benchmarks(["ceval_law"], files=files)
    with pytest.raises(ValueError, match="lm_eval ls tasks"):
        load_benchmarks(["xyzzyplugh"], files=files)


def test_a_task_must_not_be_run_twice(files: BenchmarkFiles) -> None:
    with pytest.raises(ValueError, match="'ceval-valid_law' is also in another of"):
        load_benchmarks(["ceval_two", "ceval-valid_law"], files=files)


def test_missing_data_is_named_with_its_task(files: BenchmarkFiles) -> None:
    with pytest.raises(FileNotFoundError, match=r"'mmlu_anatomy': .* has no dataset cais/mmlu"):
        load_benchmarks(["mmlu_anatomy"], files=files)
    with pytest.raises(ValueError, match="'ceval-valid_logic': its data cannot be used"):
        load_benchmarks(["ceval-valid_logic"], files=files)
    (files.path / "hellaswag_val.jsonl").write_text('{"endings": ["a"], "label": "0"}\n')
    with pytest.raises(ValueError, match=r"'hellaswag' reads the split 'train'"):
        load_benchmarks(["hellaswag"], files=files)
    with pytest.raises(ValueError, match="`num_fewshot=-1`"):
        load_benchmarks(["hellaswag"], num_fewshot=-1, files=files)


def test_prompts_that_are_cut_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lm_eval.models.huggingface")
    handlers = logging.getLogger("lm_eval").handlers
    with harness_messages() as messages:
        logger.warning("Combined length … Truncating 3 tokens from the left.")
        logger.warning("Left truncation applied. …")
        logger.warning("something else")
        logger.error("an error")
    assert messages.prompts_cut == 2
    assert capsys.readouterr().err == "an error\n"
    assert logging.getLogger("lm_eval").handlers is handlers
