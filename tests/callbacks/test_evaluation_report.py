"""The report's file against what the module found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.callbacks import EvaluationReport
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]

DATA = FixedBatches([random_batch([20, 9], sources=2)], ["zh", "en"])


@pytest.mark.parametrize(("method", "stage"), [("validate", "val"), ("test", "test")])
def test_it_holds_every_source(method: str, stage: str, tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    run = trainer(limit_val_batches=None, callbacks=[EvaluationReport()])
    getattr(run, method)(module, DATA)
    report = json.loads((tmp_path / f"{method}.json").read_text(encoding="utf-8"))
    assert report["sources"] == module.source_likelihoods[stage]
    assert set(report["sources"]) == {"zh", "en"}
    assert (report["base"], report["quantization"], report["checkpoint"]) == (module.base, "nf4", None)


def test_validation_inside_training_writes_nothing(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    trainer(max_steps=1, limit_val_batches=None, callbacks=[EvaluationReport()]).fit(module, DATA)
    assert "zh" in module.source_likelihoods["val"]
    assert not list(tmp_path.glob("*.json"))


def test_what_is_no_number_is_null(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    batch = random_batch([20])
    batch["text_mask"].zero_()
    trainer(callbacks=[EvaluationReport()]).test(module, FixedBatches([batch]))
    assert json.loads((tmp_path / "test.json").read_text())["sources"]["zh"]["bits_per_byte"] is None
