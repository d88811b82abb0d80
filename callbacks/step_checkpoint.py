"""Checkpoints by optimizer step, and one of the last step."""

import os
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, set to keep the newest few and to save the last step of a run, too.

    ``last.ckpt`` is a link to the newest, which is changed in one step, so that ``--ckpt_path last`` works after a kill
    at any moment.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: How many of the newest stay; two, so that a broken disk write leaves one.
        dirpath: Folder; null is ``checkpoints/`` in the run's folder.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2, dirpath: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps={every_n_steps}`: expected at least 1 optimizer step between checkpoints")
        if keep < 1:
            raise ValueError(f"`keep={keep}`: expected at least 1 checkpoint to keep")
        super().__init__(
            dirpath=dirpath,
            filename="step={step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last="link",
            every_n_train_steps=every_n_steps,
            # A step that is saved again after a kill takes its old name, and `last.ckpt` has no second.
            enable_version_counter=False,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the step that a resumed run starts from as saved.

        Else ModelCheckpoint would save it again, after the next micro-batch: in the middle of an accumulation.
        """
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step where it is not a multiple of ``every_n_steps``."""
        if trainer.global_step > 0 and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        # ModelCheckpoint removes the old link before it makes the new one.
        if trainer.is_global_zero:
            unfinished = f"{linkpath}.unfinished"
            Path(unfinished).unlink(missing_ok=True)
            os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), unfinished)
            os.replace(unfinished, linkpath)
        trainer.strategy.barrier()
