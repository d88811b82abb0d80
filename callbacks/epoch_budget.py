"""Runs that end when the sources have been read as often as they say, with a schedule that ends with them."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lightning_mixcn.data import StreamDataModule
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import write_text

EPOCHS_FILE = "epochs.json"


class EpochBudget(Callback):
    """Sets the steps of `fit` to those in which every source is read ``max_epochs`` times.

    The rows of a run are only known once its text has been tokenized, so this is done once before training, with a
    progress bar, each rank a share of the streams; ``epochs.json`` in the run's folder keeps their number. The command
    line adds this callback where neither ``trainer.max_steps`` nor ByteBudget says how long the run is;
    ``trainer.max_epochs: N`` there means ``max_epochs: N`` of every source that has none. A run with a source that
    never ends stays as it is, and so does one of ``trainer.fast_dev_run``.
    """

    run_files = (EPOCHS_FILE,)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the steps, before the optimizer and its schedule are made.

        Raises:
            ValueError: the sources hold no row.
        """
        data = getattr(trainer, "datamodule", None)
        self._rows_a_step = 0
        self._record = ""
        host: Any = trainer  # Lightning sets `fast_dev_run` outside of the class
        if stage != "fit" or host.fast_dev_run or not isinstance(data, StreamDataModule):
            return
        rows = self._rows(trainer, data)
        if rows is None:
            return
        if rows == 0:
            raise UserError("The sources hold no row to train on. Check `data.init_args.sources`, or `on_too_long`")
        batches = -(-rows // data.rows_a_batch)
        # Lightning takes a step at the end of the data, whatever number of micro-batches is there.
        steps = -(-batches // trainer.accumulate_grad_batches)
        self._rows_a_step = data.rows_a_batch * trainer.accumulate_grad_batches
        # Where Lightning keeps them; `Trainer(max_steps=…)` writes there too.
        trainer.fit_loop.epoch_loop.max_steps = steps
        rank_zero_info(f"EpochBudget: the sources, read `max_epochs` times, are {rows:,} rows, {steps:,} steps")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the number again where `--overwrite` has just removed it with the old run."""
        file = Path(trainer.default_root_dir, EPOCHS_FILE)
        if trainer.is_global_zero and self._record and not file.is_file():
            write_text(file, self._record)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to go on with steps of another size.

        Raises:
            ValueError: the number of steps would be wrong.
        """
        data = getattr(trainer, "datamodule", None)
        if not self._rows_a_step or not isinstance(data, StreamDataModule):
            return
        done = data.rows_trained
        is_over = trainer.global_step >= trainer.max_steps
        if not is_over and done != trainer.global_step * self._rows_a_step:
            raise UserError(
                f"The checkpoint's {trainer.global_step} steps were {done} rows, but a step is {self._rows_a_step} "
                "rows here, so the steps of an epoch are not known. Keep `micro_batch_size` times ranks times "
                "`accumulate_grad_batches` as it was, or give `trainer.max_steps`"
            )

    def _rows(self, trainer: Trainer, data: StreamDataModule) -> int | None:
        """Count the rows, or read what was counted before; None if a source never ends."""
        file, order = Path(trainer.default_root_dir, EPOCHS_FILE), json.loads(json.dumps(data.order()))
        rows: int | None = _kept(file, order) if trainer.is_global_zero else None
        rows = trainer.strategy.broadcast(rows)  # the file may be on a disk of rank 0 only
        if rows is None:
            rows = _counted(trainer, data)
        if rows is not None and trainer.is_global_zero:
            self._record = json.dumps({"rows": rows, "order": order}, ensure_ascii=False, indent=2) + "\n"
            write_text(file, self._record)
        return rows


def _kept(file: Path, order: Any) -> int | None:
    """Read what was counted before for the same order of rows."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return int(kept["rows"]) if kept["order"] == order else None


def _counted(trainer: Trainer, data: StreamDataModule) -> int | None:
    """Count the rows, each rank those of its share of the streams: no rank waits long for another one."""
    mine = range(trainer.global_rank, data.num_streams, trainer.world_size)
    with tqdm(desc="counting rows", unit=" rows", leave=False, delay=2, disable=not trainer.is_global_zero) as bar:
        rows = data.count_rows(bar.update, mine)
    if rows is None:  # on all ranks
        return None
    # The last row of the run is the last one of all streams.
    largest = torch.tensor(rows, dtype=torch.int64, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(largest, reduce_op="max"))
