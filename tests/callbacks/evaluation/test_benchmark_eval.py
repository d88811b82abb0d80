"""Benchmarks while it trains: when, what is logged, and that training does not notice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from lightning_mixcn.callbacks import BenchmarkEval
from lightning_mixcn.model import MoePeftModel
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.task_scores import run_task
from lightning_mixcn.studies.tasks import load_benchmarks
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed
from lightning_mixcn.text import load_tokenizer
from tests.callbacks.ranks_run import fit_with_benchmarks
from tests.studies.benchmark_data import HARNESS_WARNINGS, few_tasks, harness, write_ceval

Make = Callable[..., Any]
LAW = "ceval-valid_law"
pytestmark = [
    pytest.mark.filterwarnings(HARNESS_WARNINGS),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    found = few_tasks()
    monkeypatch.setattr(benchmark_tasks, "task_manager", lambda: found)


def data() -> FixedBatches:
    return FixedBatches([random_batch([20])] * 10)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "benchmarks.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("few")
def test_before_during_and_after(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    callback = BenchmarkEval(["ceval_two"], every_n_steps=2, limit=5, data_dir=str(write_ceval(tmp_path)))
    logger = CSVLogger(str(tmp_path), name="logs", version="")
    run = trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[callback], logger=logger, log_every_n_steps=1)
    run.fit(module, data())
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [0, 2, 3]
    assert set(found[0]["tasks"]) == {"ceval_two", LAW, "ceval-valid_accountant"}
    logger.save()
    header = (tmp_path / "logs" / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {f"benchmarks/{name}/acc" for name in found[0]["tasks"]} <= set(header)


@pytest.mark.usefixtures("few")
def test_figures_are_those_of_the_trained_model(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    from lightning_mixcn.studies.harness import HarnessModel

    folder = write_ceval(tmp_path)
    callback = BenchmarkEval([LAW], limit=20, data_dir=str(folder))
    trainer(max_steps=2, callbacks=[callback]).fit(module, data())
    assert [line["step"] for line in lines(tmp_path)] == [0, 2]
    assert isinstance(module.model, MoePeftModel)
    assert module.model.training
    lm = HarnessModel(module.model.eval(), load_tokenizer(module.tokenizer_path), 8)
    benchmarks = load_benchmarks([LAW], files=BenchmarkFiles(folder))
    assert run_task(lm, benchmarks, LAW, limit=20)[0] == callback.scores[LAW]


@pytest.mark.usefixtures("few")
def test_training_does_not_notice(tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    folder = write_ceval(tmp_path)
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "w1", "w2", "w3"])
    ends = []
    for callbacks in ([], [BenchmarkEval([LAW], every_n_steps=1, limit=2, data_dir=str(folder))]):
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora)
        trainer(max_steps=3, callbacks=callbacks).fit(module, data())
        assert module.model is not None
        assert all(child.training for child in module.model.modules())
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_ranks_evaluate_together(strategy: str, tmp_path: Path, tiny_base: Path) -> None:
    harness()
    data = str(write_ceval(tmp_path / "data"))
    (alone,) = run_distributed(fit_with_benchmarks, 1, str(tiny_base), str(tmp_path / "one"), data, "auto", 1)
    together = run_distributed(fit_with_benchmarks, 2, str(tiny_base), str(tmp_path / "two"), data, strategy, 2)
    assert together[0] == together[1] == alone
    steps = [[line["step"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert steps == [[0, 1, 2]] * 2  # rank zero alone writes


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["ceval-valid_laws"]}, "Did you mean ceval-valid_law"),
        ({"tasks": [LAW], "apply_chat_template": True}, "has no chat template"),
    ],
)
def test_a_run_that_could_not_be_evaluated_does_not_start(
    arguments: dict[str, Any], message: str, tmp_path: Path, module: PretrainModule, trainer: Make
) -> None:
    callback = BenchmarkEval(**arguments, data_dir=str(write_ceval(tmp_path)))
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[callback]).fit(module, data())
    assert module.model is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, r"`tasks=\[\]`: expected at least one task"),
        ({"tasks": [LAW], "every_n_steps": 0}, "`every_n_steps=0`"),
        ({"tasks": [LAW], "limit": 0}, "`limit=0`"),
        ({"tasks": [LAW], "batch_size": 0}, "`batch_size=0`"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkEval(**arguments)
