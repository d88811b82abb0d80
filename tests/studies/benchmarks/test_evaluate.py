"""`mixcn evaluate`: the harness's scores on stock transformers, resuming, and what is refused before work starts."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lightning_mixcn.cli import main
from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.studies.benchmarks import plan as evaluation_plan
from lightning_mixcn.studies.task_scores import run_task
from tests.model.adapters_on_disk import save_adapter
from tests.studies.benchmark_data import HARNESS_WARNINGS, few_tasks, harness, real_files, write_ceval, write_hellaswag

pytestmark = [
    pytest.mark.filterwarnings(HARNESS_WARNINGS),
    # PEFT's conversion of w1 and w3 to the fused layout leaves patterns for what is not adapted.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
EXACT = ["--quantization=none", "--dtype=float32", "--device=cpu"]
TWO = ["--tasks", "ceval-valid_law,ceval-valid_accountant"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = few_tasks()
    monkeypatch.setattr(benchmark_tasks, "task_manager", lambda: found)
    return found


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lightning_mixcn.model.find.load_found", refuse)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def by_hand(model: Any, folder: Path, tasks: list[str], manager: Any, **options: Any) -> dict[str, Any]:
    """Run the harness itself, with stock transformers, in the folder of the same data."""
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from lightning_mixcn.studies.task_files import BenchmarkFiles

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    with BenchmarkFiles(options.pop("data")).in_place_of_hub(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)  # a report of the machine, which takes seconds
        found: dict[str, Any] = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, **options)["results"]
    return found


def report_of(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_scores_are_those_of_the_harness_on_stock_transformers(
    tmp_path: Path, few: Any, stories_base: Path, no_network: None
) -> None:
    data = write_hellaswag(tmp_path, items=8)
    for name in ("ceval.zip", "cmmlu.zip", "mmlu.zip"):
        (data / name).symlink_to(real_files() / name)
    tasks = ["ceval-valid_accountant", "cmmlu_agronomy", "mmlu_anatomy", "hellaswag"]
    out = tmp_path / "scores.json"
    options = ["--num_fewshot=1", "--limit=8", f"--data_dir={data}", f"--out={out}", *EXACT]
    assert main(["evaluate", str(stories_base), "--tasks", *tasks, *options]) == 0
    stock = transformers.AutoModelForCausalLM.from_pretrained(stories_base, dtype=torch.float32)
    expected = by_hand(stock, stories_base, tasks, few, num_fewshot=1, limit=8, data=data)
    found = report_of(out)["tasks"]["model"]
    assert sorted(found) == sorted(tasks)
    for name in tasks:
        assert found[name]["shots"] == 1
        assert found[name]["metrics"] == {k: v for k, v in expected[name].items() if k not in ("name", "alias")}
    assert {found[name]["metrics"]["acc,none"] for name in tasks} - {0.0, 1.0}


def test_base_beside_adapted(
    tmp_path: Path, few: Any, tiny_base: Path, capsys: pytest.CaptureFixture[str], no_network: None
) -> None:
    """The base's column is the stock model's, the adapted one's stock PEFT's."""
    data, adapter, out = write_ceval(tmp_path), tmp_path / "adapter", tmp_path / "scores.json"
    save_adapter(tiny_base, adapter, scale=0.3)
    command = ["evaluate", str(adapter), "--tasks=ceval-valid_law", f"--data_dir={data}", f"--out={out}", *EXACT]
    assert main(command) == 0
    report, table = report_of(out), capsys.readouterr().out
    tasks = report["settings"]["tasks"]
    stock = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    expected = {"base": by_hand(stock, tiny_base, tasks, few, data=data)}
    adapted = peft.PeftModel.from_pretrained(stock, str(adapter)).eval()
    expected["adapted"] = by_hand(adapted, tiny_base, tasks, few, data=data)
    for model, results in expected.items():
        for name in tasks:
            assert report["tasks"][model][name]["metrics"]["acc,none"] == results[name]["acc,none"]
    row = next(row for row in report["rows"] if row["task"] == tasks[0] and row["metric"] == "acc")
    accuracies = [expected[model][tasks[0]]["acc,none"] for model in ("base", "adapted")]
    assert accuracies[0] != accuracies[1]
    assert row["difference"] == pytest.approx(accuracies[1] - accuracies[0])
    assert (row["test"], row["language"], row["documents"]) == ("mcnemar", "zh", 40)
    assert 0 < row["p_value"] <= 1
    assert "[zh]" in table
    assert f"{accuracies[1]:.4f}" in table


def test_a_four_bit_model_goes_in_as_it_is(tmp_path: Path, few: Any, tiny_base: Path) -> None:
    data, out = write_ceval(tmp_path), tmp_path / "scores.json"
    arguments = ["--limit=4", f"--data_dir={data}", f"--out={out}", "--quantization=nf4", "--device=cpu"]
    assert main(["evaluate", str(tiny_base), "--tasks=ceval_two", *arguments]) == 0
    report = report_of(out)
    assert report["rows"][0]["task"] == "ceval_two"
    assert "ceval_two" in report["table"]
    assert "ceval-valid_law" not in report["table"]  # the group stands for its tasks


def test_it_goes_on_where_it_was_killed(
    tmp_path: Path, few: Any, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, adapter = write_ceval(tmp_path), tmp_path / "adapter"
    save_adapter(tiny_base, adapter)
    command = ["evaluate", str(adapter), *TWO, "--limit=3", f"--data_dir={data}", *EXACT]
    assert main([*command, f"--out={tmp_path / 'whole.json'}"]) == 0
    done: list[str] = []

    def run_until(limit: int) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            if len(done) == limit:
                raise KeyboardInterrupt
            made = run_task(*arguments, **options)
            done.append(arguments[2])
            return made

        return run

    out = tmp_path / "scores.json"
    for limit in (1, 3):
        monkeypatch.setattr(evaluation_plan, "run_task", run_until(limit))
        assert main([*command, f"--out={out}"]) == 130
        assert not out.exists()
    monkeypatch.setattr(evaluation_plan, "run_task", run_until(99))
    assert main([*command, "--limit=2", f"--out={out}"]) == 2  # other arguments
    assert "limit=3" in capsys.readouterr().err
    assert main([*command, f"--out={out}"]) == 0
    assert done == ["ceval-valid_law", "ceval-valid_accountant"] * 2  # each once a model
    assert report_of(out) == report_of(tmp_path / "whole.json")
    assert {path.name for path in tmp_path.iterdir()} == {"ceval-exam", "adapter", "scores.json", "whole.json"}
    # Again: nothing is done, the table is shown, and other arguments do not replace it.
    capsys.readouterr()
    monkeypatch.setattr(evaluation_plan, "run_task", run_until(0))
    assert main([*command, f"--out={out}"]) == 0
    assert report_of(out)["table"] in capsys.readouterr().out
    assert main([*command, "--limit=2", f"--out={out}"]) == 2


@pytest.mark.slow  # three processes, each with the harness's whole index
def test_a_killed_process_is_gone_on_with(tmp_path: Path, tiny_base: Path) -> None:
    harness()
    data, out = write_ceval(tmp_path, questions=300), tmp_path / "scores.json"
    command = [sys.executable, "-m", "lightning_mixcn", "evaluate", str(tiny_base), *TWO, f"--data_dir={data}", *EXACT]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    parts = tmp_path / ".scores.json.unfinished"
    with subprocess.Popen([*command, f"--out={out}"], env=environment, stderr=subprocess.DEVNULL) as process:
        while not list(parts.glob("model.task.*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    first = {path: path.stat().st_mtime_ns for path in parts.glob("model.task.*")}
    assert len(first) == 1
    assert not out.exists()
    for target in (out, tmp_path / "whole.json"):
        subprocess.run([*command, f"--out={target}"], env=environment, check=True, stderr=subprocess.DEVNULL)
    assert report_of(out) == report_of(tmp_path / "whole.json")


@pytest.mark.slow  # generation, token by token
def test_generated_answers_are_those_of_stock_transformers(tmp_path: Path, few: Any, stories_base: Path) -> None:
    """GSM8K, whose answer filters give two figures; the model knows no sums."""
    for split in ("train", "test"):
        lines = (real_files() / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"gsm8k_{split}.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    out = tmp_path / "scores.json"
    options = ["--num_fewshot=0", "--limit=4", f"--data_dir={tmp_path}", f"--out={out}", *EXACT]
    assert main(["evaluate", str(stories_base), "--tasks=gsm8k", *options]) == 0
    stock = transformers.AutoModelForCausalLM.from_pretrained(stories_base, dtype=torch.float32)
    expected = by_hand(stock, stories_base, ["gsm8k"], few, num_fewshot=0, limit=4, data=tmp_path)["gsm8k"]
    found = report_of(out)["tasks"]["model"]["gsm8k"]["metrics"]
    assert found == {key: value for key, value in expected.items() if key not in ("name", "alias")}
    assert [(row["metric"], row["filter"], row["language"]) for row in report_of(out)["rows"]] == [
        ("exact_match", "strict-match", "en"),
        ("exact_match", "flexible-extract", "en"),
    ]


def test_a_chat_template_is_used(tmp_path: Path, few: Any, tiny_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    data, scores = write_ceval(tmp_path), []
    for number, chat in enumerate(("true", "false")):
        out = tmp_path / f"{number}.json"
        options = [f"--apply_chat_template={chat}", f"--data_dir={data}", f"--out={out}", *EXACT]
        assert main(["evaluate", str(base), "--tasks=ceval-valid_law", *options]) == 0
        scores.append(report_of(out)["tasks"]["model"]["ceval-valid_law"]["metrics"])
    stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = by_hand(stock, base, ["ceval-valid_law"], few, data=data, apply_chat_template=True)
    assert scores[0]["acc,none"] == expected["ceval-valid_law"]["acc,none"]
    assert scores[0] != scores[1]


@pytest.mark.usefixtures("few", "no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=ceval-valid_laws"], "Did you mean ceval-valid_law"),
        (["--tasks=mmlu_anatomy"], "no dataset cais/mmlu"),
        (["--tasks=,"], "`tasks` is empty"),
        ([*TWO, "--adapter=on"], "has no adapter"),
        ([*TWO, "--apply_chat_template=true"], "has no chat template"),
        ([*TWO, "--limit=2.5"], "`limit=2.5`"),
        ([*TWO, "--batch_size=0"], "`batch_size=0`"),
        ([*TWO, "--shard=true"], "`shard` shares the weights of several processes"),
        ([*TWO, "--device=abacus"], "`device='abacus'` is not known"),
        ([*TWO, "--num_fewshot=-1"], "`num_fewshot=-1`"),
        ([*TWO, "--languages=thai"], "pattern=language"),
        ([*TWO, "--eos_probe=en"], "expected name=PATH"),
        ([*TWO, "--eos_probe=en=nothing.txt"], "matches no file"),
        ([*TWO, "--data_dir=nothing"], "is not a folder"),
        ([*TWO, "--out=taken.json"], "exists and is no evaluation"),
        ([*TWO, "--submission=taken.json"], "exists"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(write_ceval(tmp_path))
    Path("taken.json").write_text("{}", encoding="utf-8")
    before = sorted(Path().iterdir())
    assert main(["evaluate", str(tiny_base), "--out=scores.json", "--data_dir=.", *EXACT, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_without_the_harness(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    # Only this package: jsonargparse asks for others once, and remembers what it heard.
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *package: None if name == "lm_eval" else find_spec(name, *package)
    )
    assert main(["evaluate", str(tiny_base), "--tasks=mmlu", f"--out={tmp_path / 'scores.json'}"]) == 2
    assert "pip install 'lightning_mixcn[eval]'" in capsys.readouterr().err


def test_help_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "The cost, for each model" in text
    assert "2.6e17 FLOP" in text
