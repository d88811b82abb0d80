"""Runs whose dropout masks are written down, for `run_distributed`."""

import hashlib
from typing import Any

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn.callbacks import StepCheckpoint
from lightning_mixcn.model.experts.loop import Dropout
from lightning_mixcn.modules import FSDP2Strategy, PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch


def masks(
    base: str, out: str, strategy: str, mode: str, max_steps: int, ckpt_path: str | None = None
) -> list[tuple[set[str], set[str]]]:
    """Train on the same rows again and again, two micro-batches a step.

    Returns:
        For each micro-batch digests of the masks that its forward pass drew, and of those that recomputation drew.
    """
    found: list[tuple[set[str], set[str]]] = []
    dropout, mask_of_experts = torch.nn.functional.dropout, Dropout.mask

    def note(mask: Tensor) -> None:
        again = torch._C._current_graph_task_id() != -1
        found[-1][again].add(hashlib.sha256(mask.detach().float().numpy().tobytes()).hexdigest())

    def noted(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        mask = dropout(torch.ones_like(x), p)
        note(mask)
        return x * mask

    def noted_of_experts(self: Dropout, shape: torch.Size, stream: int, like: Tensor) -> Tensor | None:
        mask = mask_of_experts(self, shape, stream, like)
        if mask is not None and stream == 0:  # one a layer; the others are of as many rows as an expert has
            note(mask)
        return mask

    class Noting(PretrainModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            found.append((set(), set()))

    torch.nn.functional.dropout, Dropout.mask = noted, noted_of_experts  # type: ignore[assignment,method-assign]
    try:
        lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "o_proj", "gate", "w1", "w2"])
        module = Noting(base, dtype="float32", lora=lora, activation_checkpointing=mode)  # type: ignore[arg-type]
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        trainer = Trainer(
            accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy,
            max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=2, use_distributed_sampler=False, logger=False,
            callbacks=[StepCheckpoint(every_n_steps=1, keep=9, dirpath=f"{out}/checkpoints")], default_root_dir=out,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, FixedBatches([random_batch([24, 17])] * 100), ckpt_path=ckpt_path)
    finally:
        torch.nn.functional.dropout, Dropout.mask = dropout, mask_of_experts  # type: ignore[method-assign]
    return found
