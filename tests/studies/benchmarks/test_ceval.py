"""The submission for C-Eval's hidden test: its form, and the letters that the harness would choose."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lightning_mixcn.cli import main
from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.studies.benchmarks import ceval as ceval_submission
from lightning_mixcn.studies.benchmarks.ceval import hidden_test_benchmarks, predict_subject, subject_of
from lightning_mixcn.studies.task_files import BenchmarkFiles
from tests.studies.benchmark_data import HARNESS_WARNINGS, few_tasks, write_ceval
from tests.studies.benchmarks.harness_oracle import fake_model

pytestmark = pytest.mark.filterwarnings(HARNESS_WARNINGS)
LAW = "ceval-valid_law"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    found = few_tasks()
    monkeypatch.setattr(benchmark_tasks, "task_manager", lambda: found)


def test_the_likeliest_letter_is_answered(tmp_path: Path) -> None:
    benchmarks = hidden_test_benchmarks(2, BenchmarkFiles(write_ceval(tmp_path)), group="ceval_two")
    prompts: list[str] = []

    def likelihood(request: Any) -> float:
        prompts.append(request.args[0])
        return float(request.args[1].strip() == "ABCD"[int(request.doc["id"]) % 4])

    answers = predict_subject(fake_model(likelihood), benchmarks, LAW)
    assert answers == {"0": "A", "1": "B", "2": "C", "3": "D", "4": "A", "5": "B"}
    assert subject_of(benchmarks, LAW) == "law"
    # Two examples of the dev split with their answers, then the question of the test split.
    dev = (tmp_path / "ceval-exam" / "dev" / "law_dev.csv").read_text(encoding="utf-8").splitlines()[1:3]
    assert [f"答案： {line.rpartition(',')[2]}\n" in prompts[0] for line in dev] == [True, True]
    assert prompts[0].endswith("答案：")


def test_no_test_split(tmp_path: Path) -> None:
    for file in (write_ceval(tmp_path) / "ceval-exam" / "test").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="has no test split"):
        hidden_test_benchmarks(None, BenchmarkFiles(tmp_path), group="ceval_two")


def test_the_file_is_what_the_site_takes(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters are those of stock transformers' logits after the prompt."""
    original = hidden_test_benchmarks
    monkeypatch.setattr(
        "lightning_mixcn.studies.benchmarks.plan.hidden_test_benchmarks",
        lambda shots, files: original(shots, files, group="ceval_two"),
    )
    data, out, answers = write_ceval(tmp_path, questions=3), tmp_path / "scores.json", tmp_path / "submission.json"
    options = [f"--data_dir={data}", f"--out={out}", f"--submission={answers}", "--quantization=none"]
    command = ["evaluate", str(tiny_base), f"--tasks={LAW}", *options, "--dtype=float32", "--device=cpu"]
    assert main(command) == 0
    found = json.loads(answers.read_text(encoding="utf-8"))
    assert {subject: list(part) for subject, part in found.items()} == {
        subject: [str(number) for number in range(6)] for subject in ("law", "accountant")
    }
    stock = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    benchmarks = original(None, BenchmarkFiles(data), group="ceval_two")
    task = benchmarks.tasks[LAW]
    assert ceval_submission.GROUP == "ceval-valid"
    for doc in task.eval_docs:
        prompt = task.fewshot_context(doc, num_fewshot=0)
        scores = []
        for letter in "ABCD":
            context, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {letter}"))
            with torch.no_grad():
                logs_SV = stock(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs_SV[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        assert found["law"][doc["id"]] == "ABCD"[scores.index(max(scores))]
    assert main(command) == 0  # finished before
