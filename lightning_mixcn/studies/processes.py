"""The processes of a command that a launcher (torchrun) started several times at once."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.distributed import ReduceOp

from lightning_mixcn.errors import UserError

Result = TypeVar("Result")
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Processes wait for each other's share of a benchmark. One that dies is noticed by the launcher, which ends the others.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among those of the command.

    Args:
        rank: Its number, from 0.
        count: Number of processes.
        device: Device of this process.
    """

    rank: int
    count: int
    device: torch.device

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Have rank 0 do something, and give its result, or raise its error, on all ranks."""
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome = [work(), None]
            except Exception as error:
                outcome = [None, error]
        distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(Result, outcome[0])

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let rank 0 do something, and leave it in a cache, before the others do the same."""
        if self.rank > 0:
            distributed.barrier()
        yield
        if self.rank == 0 and self.count > 1:
            distributed.barrier()


@contextmanager
def joined_processes(device: torch.device) -> Iterator[Processes]:
    """Meet the other processes, if the environment says that there are any.

    Args:
        device: Device to compute on; of several processes, each takes the GPU of its own number.

    Raises:
        ValueError: several processes, but no launcher that says where they meet.
    """
    place = device
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1, place)
        return
    ours = not distributed.is_initialized()
    if ours:
        if missing := [name for name in _LAUNCHER_VARIABLES if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE={count} in the environment, but no {missing[0]}. Start several processes with torchrun, "
                "or unset it"
            )
        distributed.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        yield Processes(distributed.get_rank(), count, place)
    finally:
        if ours:
            distributed.destroy_process_group()


def is_first() -> bool:
    """Tell whether this process is the one that speaks: the only one, or rank 0."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def over_ranks(values: Tensor, operation: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over all ranks, where there are several, without changing it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    reduced = values.clone()
    distributed.all_reduce(reduced, operation)
    return reduced
