"""Accuracy without each expert: the harness's numbers on the model with that expert disabled; a planted expert."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mixcn.cli import main
from lightning_mixcn.model import load_mixtral
from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.studies.experts.disabling import DisabledExpert, disabled_expert
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.task_scores import run_task
from lightning_mixcn.studies.tasks import load_benchmarks
from lightning_mixcn.text import load_tokenizer
from tests.studies.benchmark_data import HARNESS_WARNINGS, few_tasks, harness, write_ceval, write_hellaswag
from tests.studies.experts.experts_command import arguments, lines_of
from tests.studies.experts.stock_experts import stock_model

pytestmark = [pytest.mark.filterwarnings(HARNESS_WARNINGS), pytest.mark.usefixtures("no_pictures")]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    harness()
    found = few_tasks()
    monkeypatch.setattr(benchmark_tasks, "task_manager", lambda: found)


def by_the_harness(base: Path, data: Path, tasks: list[str], limit: int) -> dict[tuple[str, ...], float]:
    """Its accuracies on the whole model with an expert disabled: layer, expert, mode, task, metric; and as it is."""
    from lightning_mixcn.studies.harness import HarnessModel

    model: Any = load_mixtral(base, quantization="none", dtype="float32").eval()
    lm = HarnessModel(model, load_tokenizer(base), 4)
    benchmarks = load_benchmarks(tasks, files=BenchmarkFiles(data))
    found = {}

    def run(*where: str) -> None:
        for name in benchmarks.tasks:
            metrics = run_task(lm, benchmarks, name, limit=limit)[0]["metrics"]
            found.update({(*where, name, key): metrics[f"{key},none"] for key in ("acc", "acc_norm")})

    run("base")
    for layer in range(model.config.num_hidden_layers):
        for expert in range(model.config.num_local_experts):
            for mode in ("mask", "zero"):
                with disabled_expert(model, layer, DisabledExpert(mode, expert)):
                    run(str(layer), str(expert), mode)
    return found


@pytest.mark.parametrize("task", ["ceval", pytest.param("hellaswag", marks=pytest.mark.slow)])
def test_every_accuracy_is_the_harness_s_own(
    task: str, few: None, routed_base: Path, texts: list[Path], tmp_path: Path
) -> None:
    """Letters, which share their prompt, and endings of several tokens."""
    names = ["ceval-valid_law", "ceval-valid_accountant"] if task == "ceval" else ["hellaswag"]
    data = write_ceval(tmp_path, questions=12) if task == "ceval" else write_hellaswag(tmp_path, items=6)
    more = ("--quantization=none", "--tasks", *names, "--limit=6", f"--data_dir={data}", "--max_tokens=48")
    assert main(arguments(routed_base, tmp_path / "out", texts, *more)) == 0
    expected = by_the_harness(routed_base, data, names, limit=6)
    lines = lines_of(tmp_path / "out" / "accuracy.csv")
    assert len(lines) == 3 * 4 * 2 * len(names) * 2
    for line in lines:
        key = line["layer"], line["expert"], line["mode"], line["task"], line["metric"]
        assert float(line["accuracy_base"]) == pytest.approx(expected["base", *key[3:]], abs=1e-12)
        assert float(line["accuracy_disabled"]) == pytest.approx(expected[key], abs=1e-12)
    assert {float(line["accuracy_change"]) for line in lines} - {0.0}
    report = json.loads((tmp_path / "out" / "experts.json").read_text(encoding="utf-8"))
    assert report["accuracies"][names[0]]["documents"] == 6


def test_a_group_counts_all_its_questions(few: None, routed_base: Path, texts: list[Path], tmp_path: Path) -> None:
    data = write_ceval(tmp_path, subjects=("law",), questions=8)
    write_ceval(tmp_path, subjects=("accountant",), questions=4)
    more = ("--tasks=ceval_two", f"--data_dir={data}", "--max_tokens=48", "--mode=zero")
    assert main(arguments(routed_base, tmp_path / "out", texts, *more)) == 0
    lines = [line for line in lines_of(tmp_path / "out" / "accuracy.csv") if line["metric"] == "acc"]
    found = {(line["layer"], line["expert"], line["task"]): float(line["accuracy_disabled"]) for line in lines}
    for layer, expert, _ in found:
        one, other = (found[layer, expert, f"ceval-valid_{name}"] for name in ("law", "accountant"))
        assert found[layer, expert, "ceval_two"] == pytest.approx((8 * one + 4 * other) / 12)
    ranking = (tmp_path / "out" / "ranking.txt").read_text(encoding="utf-8")
    assert "accuracy on ceval_two without an expert (zero)" in ranking
    assert "accuracy on ceval-valid_law" not in ranking


def plant(base: Path, out: Path, layer: int, expert: int) -> Path:
    """Make a model in which one expert alone does anything."""
    model = stock_model(base)
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            for other in range(len(block.mlp.experts.down_proj)):
                if (number, other) != (layer, expert):
                    block.mlp.experts.down_proj[other] = 0
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((base / name).read_bytes())
    return out


def answer_as(model_folder: Path, data: Path) -> None:
    """Make the answers of the questions what a model gives, so that it has all of them right."""
    from lightning_mixcn.studies.harness import HarnessModel

    model: Any = load_mixtral(model_folder, quantization="none", dtype="float32").eval()
    benchmarks = load_benchmarks(["ceval-valid_law"], files=BenchmarkFiles(data))
    lm = HarnessModel(model, load_tokenizer(model_folder), 4)
    _, samples = run_task(lm, benchmarks, "ceval-valid_law")
    file = data / "ceval-exam/val/law_val.csv"
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    for sample in samples:
        best = int(np.argmax([score for score, _ in sample["filtered_resps"]]))
        number = sample["doc_id"]
        lines[number] = lines[number][:-1] + "ABCD"[best]
    file.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


def test_a_planted_expert_is_found_first(few: None, routed_base: Path, texts: list[Path], tmp_path: Path) -> None:
    planted, data = plant(routed_base, tmp_path / "planted", 1, 2), write_ceval(tmp_path, ("law",), questions=30)
    answer_as(planted, data)
    more = ("--quantization=none", "--tasks=ceval-valid_law", f"--data_dir={data}", "--max_tokens=48")
    assert main(arguments(planted, tmp_path / "out", texts, *more)) == 0
    lines = [line for line in lines_of(tmp_path / "out" / "accuracy.csv") if line["metric"] == "acc"]
    assert {line["accuracy_base"] for line in lines} == {"1.0"}
    # Masking another one sends more tokens to the planted one, which changes answers, too.
    zeroed = [line for line in lines if line["mode"] == "zero"]
    assert [line for line in zeroed if float(line["accuracy_change"]) < 0] == [
        line for line in zeroed if (line["layer"], line["expert"]) == ("1", "2")
    ]
    blocks = (tmp_path / "out" / "ranking.txt").read_text(encoding="utf-8").split("\n\n")
    (block,) = (block for block in blocks if "accuracy on ceval-valid_law without an expert (zero)" in block)
    assert block.splitlines()[2].split()[:2] == ["1", "2"]


def test_killed_and_restarted_it_gives_the_same_files(
    few: None, routed_base: Path, texts: list[Path], tmp_path: Path
) -> None:
    from tests.studies.experts.test_resume import contents, kill_at

    data = write_ceval(tmp_path, ("law",), questions=6)
    more = ("--tasks=ceval-valid_law", f"--data_dir={data}", "--max_tokens=48", "--mode=zero")
    whole, resumed = (arguments(routed_base, tmp_path / name, texts, *more) for name in ("whole", "resumed"))
    assert main(whole) == 0
    with kill_at(6) as saved:
        assert main(resumed) == 130
    assert saved[-1].startswith("requests")
    assert main(resumed) == 0
    first, again = contents(tmp_path / "whole"), contents(tmp_path / "resumed")
    assert [name for name in first if first[name] != again[name]] == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--tasks=gsm8k"],
            "is of type generate_until, but accuracy without an expert is measured for multiple choice",
        ),
        (["--tasks=ceval-valid_laws"], "Did you mean ceval-valid_law"),
        (["--tasks=ceval-valid_law", "--limit=0"], "`limit=0.0`"),
        (["--limit=5"], "`limit` is for `tasks`, of which there are none"),
    ],
)
def test_bad_input_is_refused_before_work(
    more: list[str],
    message: str,
    few: None,
    routed_base: Path,
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_ceval(tmp_path)
    for split in ("train", "test"):
        record = json.dumps({"question": "1 + 1?", "answer": "2 #### 2"}) + "\n"
        (data / f"gsm8k_{split}.jsonl").write_text(record, encoding="utf-8")
    files = [] if more == ["--limit=5"] else [f"--data_dir={data}"]
    assert main([*arguments(routed_base, tmp_path / "out", texts), *more, *files]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
