"""A run of preference optimisation that gives the same numbers on any number of ranks, for `run_distributed`."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig

from lightning_mixcn.callbacks import StepCheckpoint
from lightning_mixcn.data import PreferenceDataModule
from lightning_mixcn.model import MoePeftModel
from lightning_mixcn.model.lora.attach import stored_adapter
from lightning_mixcn.modules import FSDP2Strategy, PreferenceModule
from lightning_mixcn.text import PreferenceSource

ROWS = 4  # of a step, on all ranks together
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


class Steps(Callback):
    """Keeps the figures of each step."""

    def __init__(self) -> None:
        self.step = 0
        self.figures: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.figures.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def pairs(base: str, path: str, **changes: Any) -> PreferenceDataModule:
    settings: dict[str, Any] = {
        "sequence_length": 192, "micro_batch_size": 1, "num_streams": 4, "num_workers": 0, "val_fraction": 0.1,
        "tokenizer": base,
    }  # fmt: skip
    return PreferenceDataModule([PreferenceSource("zh", path)], **(settings | changes))


def module(base: str, **changes: Any) -> PreferenceModule:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        # A schedule's length would be another in a run that is cut short.
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    }
    return PreferenceModule(base, **(settings | changes))


def train(
    base: str,
    path: str,
    out: str,
    *,
    max_steps: int = 4,
    ckpt_path: str | None = None,
    callback: Callback | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train; return each step's figures, the validation's in the end, and the adapter's factors by name."""
    ranks, steps = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1, Steps()
    model, more = module(base, **changes), [] if callback is None else [callback]
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="auto" if ranks == 1 else FSDP2Strategy(), max_steps=max_steps,
        max_epochs=-1, accumulate_grad_batches=ROWS // ranks, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, num_sanity_val_steps=0,
        val_check_interval=ROWS // ranks * 2, check_val_every_n_epoch=None, limit_val_batches=ROWS // ranks,
        callbacks=[steps, StepCheckpoint(every_n_steps=2, keep=9, dirpath=str(Path(out, "checkpoints"))), *more],
    )  # fmt: skip
    trainer.fit(model, pairs(base, path), ckpt_path=ckpt_path)
    assert isinstance(model.model, MoePeftModel)
    factors, _ = stored_adapter(model.model)
    adapter = {
        f"{name} {part}": value for name, pair in factors.items() for part, value in zip("AB", pair[:2], strict=True)
    }
    end = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"steps": steps.figures, "end": end, "adapter": adapter}
