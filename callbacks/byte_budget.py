"""Runs that see the same amount of text, however their tokenizers cut it."""

from collections.abc import Iterator
from itertools import islice

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_mixcn.data import StreamDataModule

_ROWS_MEASURED = 2048


class ByteBudget(Callback):
    """Sets the steps of `fit` so that they see ``text_bytes`` bytes of text; ``trainer.max_steps`` gives way.

    Runs with different tokenizers can be compared then: each sees the same text, in as many tokens as it needs. How
    many bytes a row has is measured before training, on the first rows (2,048, or fewer where these are the budget).
    Steps are rounded, to a multiple of ``validations``; learning-rate schedules and progress follow.

    Args:
        text_bytes: UTF-8 bytes of text, of all sources and ranks together.
        validations: How many there are, evenly spaced, the last one at the end; ``trainer.val_check_interval`` gives
            way.
    """

    def __init__(self, text_bytes: int, validations: int = 1) -> None:
        for name, value in (("text_bytes", text_bytes), ("validations", validations)):
            if value < 1:
                raise ValueError(f"`{name}={value}`: expected at least 1")
        self.text_bytes, self.validations = text_bytes, validations

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the steps, before the optimizer and its schedule are made.

        Raises:
            TypeError: the data module is none of this project's streams.
            ValueError: the sources end before the budget.
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
        rows_a_step = data.rows_a_batch * trainer.accumulate_grad_batches
        steps_a_validation = max(1, round(rows / (rows_a_step * self.validations)))
        steps = steps_a_validation * self.validations
        # Where Lightning keeps them; `Trainer(max_steps=…)` writes there too.
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.val_check_interval = steps_a_validation * trainer.accumulate_grad_batches
        rank_zero_info(f"ByteBudget: {self.text_bytes:,} bytes are {rows:,.0f} rows, {steps:,} steps")

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


def _row_bytes(data: StreamDataModule) -> Iterator[int]:
    for row in data.training_rows():
        yield sum(len(data.tokenizer.decode(part.tokens.tolist()).encode()) for part in row)
