"""Answers to C-Eval's hidden test, as its site takes them.

The harness scores C-Eval's validation split only, since the answers of the test split are not public. Here its own
tasks read the test split: prompts, examples and scoring of the choices stay the harness's.
"""

from typing import Any

import numpy as np

from lightning_mixcn.errors import UserError
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.task_scores import run_task
from lightning_mixcn.studies.tasks import Benchmarks, load_benchmarks

GROUP = "ceval-valid"
_PLACEHOLDER = "A"


def hidden_test_benchmarks(num_fewshot: int | None, files: BenchmarkFiles | None, group: str = GROUP) -> Benchmarks:
    """Return C-Eval's tasks over the test split.

    Args:
        num_fewshot: Examples in a prompt, out of the dev split; C-Eval's own tables have 5.
        files: Data on this machine instead of the hub's.
        group: The harness's name of the tasks.

    Raises:
        ValueError: the data has no test split, or what `load_benchmarks` refuses.
        FileNotFoundError: the data is not there.
    """
    benchmarks = load_benchmarks([group], num_fewshot=num_fewshot, files=files)
    for name, task in benchmarks.tasks.items():
        if "test" not in task.dataset:
            raise UserError(f"`submission`: the data of {name!r} has no test split. Add it, or leave submission out")
        task.config.test_split = "test"
        task.config.process_docs = _with_some_answer
    return benchmarks


def subject_of(benchmarks: Benchmarks, name: str) -> str:
    """Return C-Eval's name of a task's subject."""
    return str(benchmarks.tasks[name].config.dataset_name)


def predict_subject(
    lm: Any, benchmarks: Benchmarks, name: str, *, limit: float | None = None, apply_chat_template: bool = False
) -> dict[str, str]:
    """Answer a subject's questions.

    Args:
        lm: A model as the harness takes one.
        benchmarks: Result of `hidden_test_benchmarks`.
        name: Name of the task.
        limit: As in `run_task`.
        apply_chat_template: As in `run_task`.

    Returns:
        The letter that is answered to each question, by its id.
    """
    _, samples = run_task(lm, benchmarks, name, limit=limit, apply_chat_template=apply_chat_template)
    task, answers = benchmarks.tasks[name], {}
    for sample in samples:
        # The harness's choice, by which it counts `acc`: the likeliest continuation.
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        answers[str(sample["doc"]["id"])] = str(task.doc_to_choice(sample["doc"])[int(np.argmax(likelihoods))])
    return answers


def _with_some_answer(docs: Any) -> list[dict[str, Any]]:
    """Give an answer to questions without one, since the harness looks its place up; it is not used."""
    return [{**doc, "answer": doc.get("answer") or _PLACEHOLDER} for doc in docs]
