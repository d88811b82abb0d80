"""Two ranks against one: the same steps from the same micro-batches, and one file of predictions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.multiprocess

# Rank r of n takes micro-batches r, r + n, … of four; they hold 46, 3, 20 and 16 labels.
PROGRAM = """
import os, sys
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch.utils.data import DataLoader
from lightning_mixcn.callbacks import PredictionWriter
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

base, out, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
if ranks > 1:  # Lightning uses the group that is there, which meets through a file instead of a port
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=ranks)

class Shared(FixedBatches):
    def _loader(self):
        return DataLoader(self.batches[self.trainer.global_rank :: ranks], batch_size=None)
    train_dataloader = val_dataloader = predict_dataloader = _loader

module = PretrainModule(
    base, dtype="float32", lora=LoraConfig(r=4, target_modules=["q_proj", "gate", "w1", "w2", "w3"]),
    router_aux_loss_coef=0.0, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
)
lengths = [[24, 24], [3, 2], [2, 20], [9, 9]]
data = Shared([random_batch(rows, seed=seed, sources=2) for seed, rows in enumerate(lengths)], ["zh", "en"])
trainer = Trainer(
    accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=2, max_epochs=2,
    accumulate_grad_batches=4 // ranks, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, callbacks=[PredictionWriter()],
)
trainer.fit(module, data)
if trainer.is_global_zero:
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save({"state": module.state_dict(), "values": values, "val": module.source_likelihoods["val"]}, out + ".pt")
trainer.predict(module, data)
if ranks > 1:  # gloo left open at exit may abort the process
    torch.distributed.destroy_process_group()
"""


def run(base: Path, out: Path, ranks: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(base), str(out), str(ranks)],
            env=os.environ | ({"LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.load(out.with_suffix(".pt"), weights_only=True), [json.loads(line) for line in lines]


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
    assert len(one_lines) == len(two_lines) == 2
    for line, other in zip(one_lines, two_lines, strict=True):
        assert other.pop("source") == line.pop("source")
        assert other == pytest.approx(line, rel=1e-6)
