"""`mixcn evaluate` started by torchrun: the figures of one process, said once."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.studies.benchmarks.evaluate import evaluate
from lightning_mixcn.studies.benchmarks.options import EvaluationOptions
from lightning_mixcn.testing import run_distributed
from tests.model.adapters_on_disk import save_adapter
from tests.studies.benchmark_data import HARNESS_WARNINGS, few_tasks, harness, write_ceval

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings(HARNESS_WARNINGS)]


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    harness()
    save_adapter(tiny_base, tmp_path / "adapter", scale=0.3)
    return tmp_path / "adapter"


def options_of(data: Path, out: Path, texts: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "options": EvaluationOptions(
            ["ceval_two"], data_dir=str(data), batch_size=3, eos_probe=[f"en={texts}"], eos_probe_tokens=256
        ),
        "model": ModelOptions("nf4", "float32", "cpu"),
    }


def evaluate_here(src: str, options: dict[str, Any]) -> None:
    """Evaluate on one of several ranks."""
    benchmark_tasks.task_manager = few_tasks
    evaluate(src, **options)


def report_of(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def text_of(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"line {n}\nof {n * n}\n"}) + "\n" for n in range(40)), encoding="utf-8"
    )
    return file


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["replicas", "fsdp2"])
def test_two_processes_give_the_report_of_one(adapter: Path, tmp_path: Path, shard: bool) -> None:
    """Of whole copies to the last bit; of shared weights, whose products have other shapes, but for rounding."""
    data, text = write_ceval(tmp_path / "data", questions=10), text_of(tmp_path)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_tasks, "task_manager", few_tasks)
        evaluate(str(adapter), **options_of(data, one, text))
    run_distributed(evaluate_here, 2, str(adapter), options_of(data, two, text) | {"shard": shard})
    first, second = report_of(one), report_of(two)
    if not shard:
        assert first == second
    for before, after in zip(first["rows"], second["rows"], strict=True):
        assert after["scores"] == pytest.approx(before["scores"], abs=1e-6)
    for before, after in zip(
        first["eos_probe"]["models"].values(), second["eos_probe"]["models"].values(), strict=True
    ):
        assert after["en"]["mean_after_newline"] == pytest.approx(before["en"]["mean_after_newline"], rel=1e-4)
    assert not list(tmp_path.glob(".*"))


def test_errors_are_those_of_rank_0(adapter: Path, tmp_path: Path) -> None:
    data, text, out = write_ceval(tmp_path / "data", questions=4), text_of(tmp_path), tmp_path / "scores.json"
    out.write_text("{}", encoding="utf-8")
    options = options_of(data, out, text)
    with pytest.raises(RuntimeError, match="exists and is no evaluation"):
        run_distributed(evaluate_here, 2, str(adapter), options)
    with pytest.raises(RuntimeError, match="`batch_size=auto` is for one process"):
        run_distributed(
            evaluate_here, 2, str(adapter), options | {"options": replace(options["options"], batch_size="auto")}
        )


@pytest.mark.slow  # two processes, each with the harness's whole index
def test_torchrun(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_ceval(tmp_path / "data", questions=10)
    arguments = [
        "evaluate", str(adapter), "--tasks=ceval-valid_law", f"--data_dir={data}", "--dtype=float32", "--device=cpu"
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [*launcher, "-m", "lightning_mixcn", *arguments, f"--out={tmp_path / 'two.json'}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    assert main([*arguments, f"--out={tmp_path / 'one.json'}"]) == 0
    one, two = (report_of(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one == two
    assert run.stdout.strip() == one["table"] == capsys.readouterr().out.strip()
    assert run.stderr.count("1 tasks on base and adapted") == 1
    assert "2/2" in run.stderr
    assert run.stderr.count("tasks:   0%") == 1
