"""Runs of callbacks on one rank or several, for `run_distributed`."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from lightning_mixcn.callbacks import (
    BenchmarkEval,
    FewShotProbe,
    FitSummary,
    LongContextEval,
    ThroughputLogger,
    TrainabilityCheck,
)
from lightning_mixcn.model.sharding import local_shard
from lightning_mixcn.modules import FSDP2Strategy, PretrainModule
from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import Source
from tests.modules.strategy_run import SharedBatches, strategy
from tests.studies.benchmark_data import few_tasks


def _two_steps(base: str, folder: str, strategy: str, ranks: int, callback: Callback) -> tuple[PretrainModule, Trainer]:
    lora = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy, max_steps=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, default_root_dir=Path(folder), callbacks=[callback],
    )  # fmt: skip
    return PretrainModule(base, dtype="float32", lora=lora), trainer


def fit_with_benchmarks(base: str, folder: str, data: str, strategy: str, ranks: int) -> dict[str, Any]:
    """Train two steps; returns the last evaluation of this rank, by task."""
    callback = BenchmarkEval(["ceval_two"], every_n_steps=1, limit=6, batch_size=3, data_dir=data)
    module, trainer = _two_steps(base, folder, strategy, ranks, callback)
    with patch.object(benchmark_tasks, "task_manager", few_tasks):
        trainer.fit(module, FixedBatches([random_batch([20])] * 4))
    return dict(callback.scores)


def fit_with_documents(base: str, folder: str, text: str, strategy: str, ranks: int) -> list[dict[str, Any]]:
    """Train two steps on the same batches, whatever the ranks; returns the evaluations that rank zero wrote."""
    callback = LongContextEval(
        [Source("zh", text)], [32, 64, 128], documents=3, chunk=50, every_n_steps=1, retrieval=["passkey_en"],
        retrieval_lengths=[220], retrieval_depths=[0, 1], retrieval_prompts=1,
    )  # fmt: skip
    module, trainer = _two_steps(base, folder, strategy, ranks, callback)
    trainer.fit(module, FixedBatches([random_batch([20])] * 4))
    trainer.strategy.barrier()
    written = Path(folder, "long_context", "long_context.json").read_text(encoding="utf-8")
    evaluations: list[dict[str, Any]] = json.loads(written)["evaluations"]
    return evaluations


def fit_with_few_shot(base: str, folder: str, text: str, strategy: str, ranks: int) -> dict[str, Any]:
    """Train two steps on the same batches, whatever the ranks; returns the last figures of this rank."""
    callback = FewShotProbe([Source("zh", text)], every_n_steps=1, prompts=7, shots=2, characters=12, chunk=650)
    module, trainer = _two_steps(base, folder, strategy, ranks, callback)
    trainer.fit(module, FixedBatches([random_batch([20])] * 4))
    trainer.strategy.barrier()
    return dict(callback.figures)


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
                local_shard(parameter)[0][-1, -1] ^= 1
            if self.what == "detached" and name.endswith(FACTOR):
                # Expert 2's rows, wherever they are.
                assert parameter.grad is not None
                held, first = local_shard(parameter.grad)
                rows = torch.arange(first, first + len(held)) // (len(parameter) // 4)
                held[rows == 2] = 0.0


def fit_watched(cases: list[tuple[str, str]], base: str, folder: str) -> list[str]:
    """Return the error's text, or nothing, for each pair of strategy and spoiling."""
    return [_fit_watched(name, what, base, Path(folder, name, what)) for name, what in cases]


def _fit_watched(name: str, what: str, base: str, folder: Path) -> str:
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
