"""Runs that see the same amount of text, however their tokenizers cut it."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_mixcn.data import StreamDataModule

from .step_checkpoint import StepCheckpoint

_ROWS_MEASURED = 2048


class ByteBudget(Callback):
    """Sets the steps of `fit` so that they see ``text_bytes`` bytes of text; ``trainer.max_steps`` gives way.

    Runs with different tokenizers can be compared then: each sees as much text, in as many tokens as it needs. How many
    bytes a row has is measured before training, on the first rows (2,048, or fewer where these are the budget). Only
    whole steps are taken; learning-rate schedules and progress follow. Sources are mixed alike, too, where the data's
    ``weight_unit`` is ``bytes``.

    Args:
        text_bytes: UTF-8 bytes of text, of all sources and ranks together.
        validations: How many there are, evenly spaced, the last one at the end; the trainer's own interval gives way.
    """

    def __init__(self, text_bytes: int, validations: int = 1) -> None:
        for name, value in (("text_bytes", text_bytes), ("validations", validations)):
            if value < 1:
                raise ValueError(f"`{name}={value}`: expected at least 1")
        self.text_bytes, self.validations = text_bytes, validations
        self._due: list[int] = []  # steps after which there is a validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the steps, before the optimizer and its schedule are made.

        Raises:
            TypeError: the data module is none of this project's streams.
            ValueError: the sources end before the budget, or it has fewer steps than validations.
        """
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, StreamDataModule):
            raise TypeError(
                "ByteBudget measures the rows of a PretrainDataModule or InstructDataModule, "
                f"not of {type(data).__name__}"
            )
        rows = self._rows(data)
        steps = round(rows / (data.rows_a_batch * trainer.accumulate_grad_batches))
        if steps < self.validations:
            raise ValueError(
                f"`text_bytes={self.text_bytes}` are {steps} steps, fewer than `validations={self.validations}`. Give "
                "more text, smaller steps or fewer validations"
            )
        self._due = [round(steps * part / self.validations) for part in range(1, self.validations + 1)]
        # Where Lightning keeps them; `Trainer(max_steps=…)` writes there too.
        trainer.fit_loop.epoch_loop.max_steps = steps
        # In micro-batches since the beginning of the run, whatever an epoch is.
        trainer.check_val_every_n_epoch = None
        trainer.val_check_interval = steps * trainer.accumulate_grad_batches
        rank_zero_info(f"ByteBudget: {self.text_bytes:,} bytes are {rows:,.0f} rows, {steps:,} steps")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say when the next validation is due: Lightning validates where the batches are a multiple of it."""
        step = next(step for step in self._due if step > trainer.global_step)
        trainer.val_check_batch = step * trainer.accumulate_grad_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have the checkpoint of a step that is validated saved behind the validation: no resumed run lacks one."""
        if trainer.global_step in self._due:
            for checkpoint in _step_checkpoints(trainer):
                checkpoint.postpone()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            for checkpoint in _step_checkpoints(trainer):
                checkpoint.request()

    def _rows(self, data: StreamDataModule) -> float:
        """Rows that hold the budget."""
        rows = measured = 0
        for row_bytes in islice(_row_bytes(data), _ROWS_MEASURED):
            if not row_bytes:
                raise ValueError(
                    f"`text_bytes={self.text_bytes}`: the sources end after {measured:,} bytes. Give less, or raise "
                    "their `max_epochs`"
                )
            rows, measured = rows + 1, measured + row_bytes
            if measured >= self.text_bytes:
                break
        return rows * self.text_bytes / measured


def _step_checkpoints(trainer: Trainer) -> list[StepCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, StepCheckpoint)]


def _row_bytes(data: StreamDataModule) -> Iterator[int]:
    for row in data.training_rows():
        yield sum(data.tokenizer.num_bytes(part.tokens.tolist()) for part in row)
