"""The table of a run, line by line."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_mixcn.callbacks import (
    AdapterCheckpoint,
    DataMonitor,
    FitSummary,
    StepCheckpoint,
)
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Trainer]
LENGTHS = [[24, 5, 3], [7, 24, 9], [1, 2, 24], [20, 20, 20]]
BATCHES = [random_batch(lengths, seed=seed, sources=2) for seed, lengths in enumerate(LENGTHS)]


def table(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """The last message with lines, as a dictionary."""
    (text,) = [record.getMessage() for record in caplog.records if "tokens per second" in record.getMessage()]
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name: value.strip() for name, value in pairs}


def test_the_table(trainer: Make, module: PretrainModule, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    losses: list[float] = []
    log_step = module.on_train_batch_end

    def keep(outputs: object, batch: object, batch_idx: int) -> None:
        log_step(outputs, batch, batch_idx)
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
        "steps", "tokens", "duration", "tokens per second", "train nll", "val zh nll", "val en nll", "checkpoint",
        "adapter",
    ]  # fmt: skip
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

    def token_shares(self) -> dict[str, float]:
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
