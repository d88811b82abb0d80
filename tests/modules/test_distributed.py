"""Two ranks against one: the same steps from the same micro-batches, and one file of predictions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch.utils.data import DataLoader

from lightning_mixcn.callbacks import PredictionWriter
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed

pytestmark = pytest.mark.multiprocess


class Shared(FixedBatches):
    """Rank r of n takes micro-batches r, r + n, … of four; they hold 46, 3, 20 and 16 labels."""

    def _loader(self) -> DataLoader[Any]:
        mine = self.batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
        return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset, too

    train_dataloader = val_dataloader = predict_dataloader = _loader


def train_and_predict(base: str, out: str) -> dict[str, Any]:
    """Train two steps and predict, as each of the ranks. Returns: the state, and what was logged."""
    ranks = torch.distributed.get_world_size()
    module = PretrainModule(
        base, dtype="float32", lora=LoraConfig(r=4, target_modules=["q_proj", "gate", "w1", "w2", "w3"]),
        router_aux_loss_coef=0.0, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    )  # fmt: skip
    lengths = [[24, 24], [3, 2], [2, 20], [9, 9]]
    data = Shared([random_batch(rows, seed=seed, sources=2) for seed, rows in enumerate(lengths)], ["zh", "en"])
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=2, max_epochs=2,
        accumulate_grad_batches=4 // ranks, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, callbacks=[PredictionWriter()],
    )  # fmt: skip
    trainer.fit(module, data)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = {"state": module.state_dict(), "values": values, "val": module.source_likelihoods["val"]}
    trainer.predict(module, data)
    return found


def run(base: Path, out: Path, ranks: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = run_distributed(train_and_predict, ranks, str(base), str(out))[0]
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return found, [json.loads(line) for line in lines]


def test_two_ranks_do_what_one_does(tmp_path: Path, tiny_base: Path) -> None:
    (one, one_lines), (two, two_lines) = (run(tiny_base, tmp_path / f"ranks{ranks}", ranks) for ranks in (1, 2))
    trained = [name for name in one["state"] if "lora_B" in name]
    assert all(one["state"][name].abs().max() > 1e-4 for name in trained)
    for name, value in one["state"].items():
        # The same float32 sums in another order.
        torch.testing.assert_close(two["state"][name], value, rtol=1e-4, atol=1e-6)
    for name in ("train/loss", "train/nll_nats_per_token", "train/auxiliary_loss", "train/gradient_norm"):
        assert two["values"][name] == pytest.approx(one["values"][name], rel=1e-5)
    for source, result in one["val"].items():
        assert two["val"][source] == pytest.approx(result, rel=1e-6)
    # Ranks have other sources, and as many batches but not as many bytes.
    assert two["values"]["val/bits_per_byte"] == pytest.approx(one["values"]["val/bits_per_byte"], rel=1e-6)
    assert len(one_lines) == len(two_lines) == 2
    for line, other in zip(one_lines, two_lines, strict=True):
        assert other.pop("source") == line.pop("source")
        assert other == pytest.approx(line, rel=1e-6)
