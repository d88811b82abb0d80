"""A run that evaluates long documents on one rank or several, for `run_distributed`."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from peft import LoraConfig

from lightning_mixcn.callbacks import LongContextEval
from lightning_mixcn.modules import FSDP2Strategy, PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import Source


def fit(base: str, folder: str, text: str, strategy: str, ranks: int) -> list[dict[str, Any]]:
    """Train two steps on the same batches, whatever the ranks; returns the evaluations that rank zero wrote."""
    callback = LongContextEval(
        [Source("zh", text)], [32, 64, 128], documents=3, chunk=50, every_n_steps=1, retrieval=["passkey_en"],
        retrieval_lengths=[220], retrieval_depths=[0, 1], retrieval_prompts=1,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    module = PretrainModule(base, dtype="float32", lora=lora)
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy, max_steps=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, default_root_dir=Path(folder), callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, FixedBatches([random_batch([20])] * 4))
    trainer.strategy.barrier()
    written = Path(folder, "long_context", "long_context.json").read_text(encoding="utf-8")
    evaluations: list[dict[str, Any]] = json.loads(written)["evaluations"]
    return evaluations
