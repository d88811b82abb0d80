"""Runs that write down every row they train on and may be killed at any moment, for `test_exactly_once`.

As a program it imports everything once. For each line on stdin, a JSON object of `train`'s settings, it forks a process
that leads a group of its own and starts one process a rank in it; it prints the leader's process id, and its exit code
when that has ended.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from lightning_mixcn import data as data_modules
from lightning_mixcn.callbacks import StepCheckpoint

FIELDS = ("input_ids", "labels", "position_ids", "document_ids", "source_ids", "sides")  # the last one of pairs alone


class Recorder(LightningModule):
    """Trains one number, and appends each batch to a file before it does.

    A record is the optimizer step and the shape of ``[rows, fields, sequence_length]``, then these numbers; all int64.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.path = path

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        rows = np.stack([batch[name].numpy().astype(np.int64) for name in FIELDS if name in batch], axis=1)
        header = np.asarray([self.trainer.global_step, *rows.shape])
        with Path(self.path).open("ab") as file:
            file.write(header.tobytes() + rows.tobytes())
            file.flush()
            os.fsync(file.fileno())
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(rank: int, run: dict[str, Any]) -> None:
    """Train as one rank.

    Args:
        rank: This process's number.
        run: ``ranks``, ``accumulate``, ``max_steps``, ``every_n_steps`` between checkpoints, ``folder`` of the run,
            ``name`` of this part of it, ``resume``, a checkpoint or null, ``data_module``, its class, and ``data``, its
            arguments.
    """
    ranks, folder = run["ranks"], run["folder"]
    if ranks > 1:  # Lightning uses the group that is there, which meets through a file instead of a port
        os.environ["LOCAL_RANK"] = str(rank)
        meet = f"file://{folder}/{run['name']}.meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=run["max_steps"],
        max_epochs=-1,
        accumulate_grad_batches=run["accumulate"],
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[StepCheckpoint(every_n_steps=run["every_n_steps"], dirpath=f"{folder}/checkpoints")],
    )
    data = getattr(data_modules, run["data_module"])(**run["data"])
    trainer.fit(Recorder(f"{folder}/{run['name']}.{rank}.rows"), datamodule=data, ckpt_path=run["resume"])


def lead(run: dict[str, Any]) -> None:
    """Run all ranks, in a process group that can be killed as a whole, and exit."""
    os.setsid()
    os.dup2(2, 1)  # stdout is for what `serve` prints
    try:
        start_processes(train, (run,), nprocs=run["ranks"], start_method="fork")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def serve() -> None:
    """Run what stdin says, one run at a time."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            lead(json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
