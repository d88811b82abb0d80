"""A run with benchmarks on one rank or several, for `run_distributed`."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Trainer
from peft import LoraConfig

from lightning_mixcn.callbacks import BenchmarkEval
from lightning_mixcn.modules import FSDP2Strategy, PretrainModule
from lightning_mixcn.studies import tasks as benchmark_tasks
from lightning_mixcn.testing import FixedBatches, random_batch
from tests.studies.benchmark_data import few_tasks


def fit(base: str, folder: str, data: str, strategy: str, ranks: int) -> dict[str, Any]:
    """Train two steps; returns the last evaluation of this rank, by task."""
    callback = BenchmarkEval(["ceval_two"], every_n_steps=1, limit=6, batch_size=3, data_dir=data)
    lora = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    module = PretrainModule(base, dtype="float32", lora=lora)
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy, max_steps=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, default_root_dir=Path(folder), callbacks=[callback],
    )  # fmt: skip
    with patch.object(benchmark_tasks, "task_manager", few_tasks):
        trainer.fit(module, FixedBatches([random_batch([20])] * 4))
    return dict(callback.scores)
