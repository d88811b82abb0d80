"""Runs on several ranks that `TrainabilityCheck` watches, good ones and spoiled ones, for `run_distributed`."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from lightning_mixcn.callbacks import FitSummary, ThroughputLogger, TrainabilityCheck
from lightning_mixcn.model.local_rows import local_rows
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import random_batch
from tests.modules.strategy_run import SharedBatches, strategy

CODES = "layers.1.mlp.experts.up_proj.base_layer.storage.codes"
FACTOR = "layers.1.mlp.experts.up_proj.lora_B.default.weight"


class Spoiler(Callback):
    """Does its work in the first step; a code is changed on the first rank, which holds the only superblock."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, parameter in parameters.items():
            if self.what == "changed" and name.endswith(CODES) and trainer.is_global_zero:
                local_rows(parameter)[0][-1, -1] ^= 1
            if self.what == "detached" and name.endswith(FACTOR):
                # Expert 2's rows, wherever they lie.
                assert parameter.grad is not None
                held, first = local_rows(parameter.grad)
                rows = torch.arange(first, first + len(held)) // (len(parameter) // 4)
                held[rows == 2] = 0.0


def fit(cases: list[tuple[str, str]], base: str, folder: str) -> list[str]:
    """What each pair of strategy and spoiling ended with: an error's text, or nothing."""
    return [_fit(name, what, base, Path(folder, name, what)) for name, what in cases]


def _fit(name: str, what: str, base: str, folder: Path) -> str:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
    module = PretrainModule(base, dtype="float32", lora=LoraConfig(r=2, target_modules=targets), train_embeddings=True)
    trainer = Trainer(
        accelerator="cpu", devices=torch.distributed.get_world_size(), strategy=strategy(name), max_steps=3,
        accumulate_grad_batches=2, logger=CSVLogger(str(folder)), log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        callbacks=[Spoiler(what), TrainabilityCheck(), ThroughputLogger(every_n_steps=2), FitSummary()],
    )  # fmt: skip
    batches = [random_batch([24, 20, 9], seed=seed) for seed in range(12)]
    try:
        trainer.fit(module, SharedBatches(batches))
    except RuntimeError as error:
        return str(error)
    return ""
