"""FSDP2 and HSDP as strategies of Lightning's, and what the model needs of a strategy.

One module runs under all of them. Under FSDP2 everything is sharded, the 4-bit base too; under DDP every rank holds
the base, the adapters and the optimizer.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_mixcn.errors import UserError, did_you_mean
from lightning_mixcn.model import shard_model

Shard = Callable[[nn.Module], None]


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` for data-parallel ranks alone, with the options of `fully_shard`.

    Args:
        shard_size: Ranks that share one copy of the model: ``all``, or ``node`` or a number for HSDP, which keeps a
            copy in each group of so many consecutive ranks, so that only gradients of adapters cross the groups.
        reshard_after_forward: Free a layer's gathered parameters between forward and backward: the least memory. Else
            every rank holds the whole base from forward to backward, for two thirds of the traffic.
        prefetch: Layers gathered ahead of the one that computes.
        save_distributed_checkpoint: Each rank writes its share into a folder; else rank 0 writes one file.
        process_group_backend: ``nccl``, ``gloo``; null chooses by device.
        timeout_minutes: Time that a rank waits for the others in a collective before it stops with an error.
    """

    def __init__(
        self,
        shard_size: int | Literal["all", "node"] = "all",
        reshard_after_forward: bool = True,
        prefetch: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 10.0,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.shard_size = shard_size
        self.reshard_after_forward = reshard_after_forward
        self.prefetch = prefetch

    def setup_environment(self) -> None:
        """Connect the ranks, all of them data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard_mesh(self) -> DeviceMesh:
        """Make the mesh for `shard_model`.

        Raises:
            ValueError: `shard_size` does not divide the number of ranks.
        """
        given = {"all": self.world_size, "node": self.num_processes}
        size = given[self.shard_size] if isinstance(self.shard_size, str) else self.shard_size
        if size < 1 or self.world_size % size:
            raise UserError(
                f"`trainer.strategy.shard_size={self.shard_size!r}`: expected a divisor of the {self.world_size} "
                "ranks, `node` or `all`"
            )
        if size == self.world_size:
            return self.device_mesh["data_parallel"]
        shape = (self.world_size // size, size)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))


# Names for `trainer.strategy`. Lightning's own `fsdp` is FSDP1, which it refuses on the CPU by this list of names.
FSDPStrategy.get_registered_strategies().remove("fsdp")
_FSDP2_NAMES, _FSDP2_SINCE = ("fsdp", "fsdp2", "hsdp"), "2.12"
for _name in ("fsdp", "fsdp2"):
    StrategyRegistry.register(
        _name, FSDP2Strategy, description="FSDP2, the 4-bit base sharded over all ranks", override=True
    )
StrategyRegistry.register("hsdp", FSDP2Strategy, description="FSDP2 inside each node", shard_size="node")


def check_strategy(strategy: Strategy | str) -> None:
    """Refuse Lightning's own FSDP, and FSDP2 where torch cannot shard 4-bit weights.

    Args:
        strategy: Strategy of the trainer, or its name in a configuration.

    Raises:
        ValueError: it is FSDP1, whose message names FSDP2; or torch is older than 2.12, of which `fully_shard` makes
            each parameter one with a gradient, uint8 too (pytorch issue 177844).
    """
    given = strategy if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, FSDPStrategy) or given in FSDPStrategy.get_registered_strategies():
        raise UserError(
            f"`trainer.strategy`: {given} is FSDP1, which is not supported any more. Set `trainer.strategy: fsdp`, "
            "which is FSDP2 (configs/trainer/fsdp2.yaml); go on from the run's adapter, `model.init_args.adapter`"
        )
    if isinstance(strategy, str) and strategy not in ("auto", *StrategyRegistry):
        near = did_you_mean(strategy, StrategyRegistry)
        raise UserError(f"`trainer.strategy={strategy!r}` is no strategy{near}; `mixcn help strategies` lists them")
    if (isinstance(strategy, ModelParallelStrategy) or given in _FSDP2_NAMES) and torch.__version__ < _FSDP2_SINCE:
        raise UserError(
            f"`trainer.strategy`: {given} needs torch {_FSDP2_SINCE} or newer, here is {torch.__version__}: older ones "
            "cannot shard 4-bit weights. Install a newer torch, or set `trainer.strategy: ddp`"
        )


def fsdp2_shard(strategy: Strategy | None) -> Shard | None:
    """Return the function that shards a model under FSDP2, or `None` under any other strategy.

    Args:
        strategy: Strategy of the trainer, its ranks connected.

    Raises:
        ValueError: The strategy asks for tensor parallelism.
    """
    if isinstance(strategy, FSDP2Strategy):
        return partial(
            shard_model,
            mesh=strategy.shard_mesh(),
            reshard_after_forward=strategy.reshard_after_forward,
            prefetch=strategy.prefetch,
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"`trainer.strategy.tensor_parallel_size={size}`: 4-bit experts have no tensor parallelism. Set it to 1 "
            f"and `data_parallel_size` to the number of ranks, {strategy.world_size}, or use FSDP2Strategy"
        )
    return partial(shard_model, mesh=strategy.device_mesh["data_parallel"])


def build_device(strategy: Strategy | None) -> torch.device:
    """Return the device of a rank's model: the strategy's, or torch's default without a trainer."""
    return torch.get_default_device() if strategy is None else strategy.root_device
