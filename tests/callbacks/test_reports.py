"""The table of a run, the report of an evaluation, and the file of predictions."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule

from lightning_mixcn.callbacks import (
    AdapterCheckpoint,
    DataMonitor,
    EvaluationReport,
    FitSummary,
    PredictionWriter,
    StepCheckpoint,
)
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]
LENGTHS = [[24, 5, 3], [7, 24, 9], [1, 2, 24], [20, 20, 20]]
BATCHES = [random_batch(lengths, seed=seed, sources=2) for seed, lengths in enumerate(LENGTHS)]


def table(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """Return the last message with lines, as a dictionary."""
    (text,) = [record.getMessage() for record in caplog.records if "tokens per second" in record.getMessage()]
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name: value.strip() for name, value in pairs}


def test_the_table(trainer: Make, module: PretrainModule, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    losses: list[float] = []

    def keep(outputs: object, batch: object, batch_idx: int) -> None:
        if batch_idx % 2:
            losses.append(float(run.callback_metrics["train/nll_nats_per_token"]))

    module.on_train_batch_end = keep  # type: ignore[method-assign]  # to look on
    run = trainer(
        max_steps=2,
        accumulate_grad_batches=2,
        limit_val_batches=2,
        val_check_interval=2,
        enable_checkpointing=True,
        callbacks=[FitSummary(), StepCheckpoint(every_n_steps=1, dirpath=str(tmp_path / "saved")), AdapterCheckpoint()],
    )
    run.fit(module, FixedBatches(BATCHES, ["zh", "en"]))
    rows = table(caplog)
    assert list(rows) == [
        "steps", "tokens", "duration", "tokens per second", "train nll", "val zh nll", "val en nll", "ended",
        "checkpoint", "adapter", "report", "talk", "merge",
    ]  # fmt: skip
    assert rows["ended"] == 'all 2 steps; more with a larger `trainer.max_steps` and fit(…, ckpt_path="last")'
    assert rows["report"] == f"mixcn report {run.default_root_dir} --out report.html"
    assert rows["talk"] == f"mixcn chat {run.default_root_dir}"
    assert rows["merge"] == f"mixcn export {run.default_root_dir} OUT"
    assert rows["steps"] == "2"
    assert rows["tokens"] == str(sum(map(sum, LENGTHS)))
    assert rows["train nll"] == f"{losses[0]:.4f} → {losses[1]:.4f} nats per token"
    last = module.source_likelihoods["val"]["zh"]["nll_nats_per_token"]
    assert rows["val zh nll"].startswith(f"{last:.4f} nats per token, best ")
    assert Path(rows["checkpoint"]).name == "last.ckpt"
    assert Path(rows["checkpoint"]).resolve().name == "step=00000002.ckpt"
    assert Path(rows["adapter"], "adapter_model.safetensors").is_file()


class Weighted(FixedBatches):
    num_streams, sequence_length = 3, 24

    def token_shares(self, last_rows: int | None = None) -> dict[str, float]:
        return {"zh": 0.6, "en": 0.4}

    def ended_sources(self) -> list[str]:
        return ["en"]


def test_the_mixture_stands_beside_what_was_asked_for(
    trainer: Make, module: PretrainModule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer(max_steps=2, callbacks=[FitSummary(), DataMonitor()]).fit(module, Weighted(BATCHES[:2], ["zh", "en"]))
    rows = table(caplog)
    assert rows["tokens of zh"] == f"{43 / 72:.1%}, asked for 60.0%"
    assert rows["tokens of en"] == f"{29 / 72:.1%}, asked for 40.0% until it ended"


def test_another_module_is_refused(trainer: Make) -> None:
    class Other(LightningModule):
        pass

    with pytest.raises(ValueError, match=r"FitSummary works with a CausalLMModule, but `model` is Other"):
        FitSummary().setup(trainer(), Other(), "fit")


DATA = FixedBatches([random_batch([20, 9], sources=2)], ["zh", "en"])


@pytest.mark.parametrize(("method", "stage"), [("validate", "val"), ("test", "test")])
def test_it_holds_every_source(method: str, stage: str, tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    run = trainer(limit_val_batches=None, callbacks=[EvaluationReport()])
    getattr(run, method)(module, DATA)
    report = json.loads((tmp_path / f"{method}.json").read_text(encoding="utf-8"))
    assert report["sources"] == module.source_likelihoods[stage]
    assert set(report["sources"]) == {"zh", "en"}
    bits = sum(source["bits_per_byte"] * source["bytes"] for source in report["sources"].values())
    assert report["bits_per_byte"] == pytest.approx(
        bits / sum(source["bytes"] for source in report["sources"].values())
    )
    assert (report["base"], report["quantization"], report["checkpoint"]) == (module.base, "nf4", None)


def test_validation_inside_training_writes_nothing(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    trainer(max_steps=1, limit_val_batches=None, callbacks=[EvaluationReport()]).fit(module, DATA)
    assert "zh" in module.source_likelihoods["val"]
    assert not list(tmp_path.glob("*.json"))


def test_what_is_no_number_is_null(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    batch = random_batch([20])
    batch["text_mask"].zero_()
    trainer(callbacks=[EvaluationReport()]).test(module, FixedBatches([batch]))
    report = json.loads((tmp_path / "test.json").read_text())
    assert report["bits_per_byte"] is report["sources"]["zh"]["bits_per_byte"] is None


def test_one_line_a_document(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    """Document i of both batches is one document, as if its second row had not fitted into the first batch."""
    batches = [random_batch([20, 24, 9], seed=0, sources=2), random_batch([5, 12], seed=1, sources=2)]
    predictions = trainer(callbacks=[PredictionWriter()]).predict(module, FixedBatches(batches, ["zh", "en"]))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["source"], line["index"]) for line in lines] == [("zh", 0), ("zh", 2), ("en", 1)]
    assert [line["tokens"] for line in lines] == [19 + 4, 8, 23 + 11]
    assert [line["bytes"] for line in lines] == [18 + 3, 7, 22 + 10]
    assert lines[0]["nats"] == float(predictions[0].nats[0] + predictions[1].nats[0])
    for line in lines:
        assert 0 < line["text_nats"] < line["nats"]
        assert line["bits_per_byte"] == pytest.approx(line["text_nats"] / math.log(2) / line["bytes"])
