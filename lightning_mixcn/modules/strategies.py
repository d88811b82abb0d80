"""What the model needs of Lightning's strategies: FSDP2 and HSDP, FSDP1, DDP.

One module runs under all of them. Under FSDP2 everything is sharded, the 4-bit base too. FSDP1 can flatten parameters
of one type only, so it shards what trains, and every rank holds the base; so it does under DDP, which also has all of
the optimizer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from lightning_mixcn.errors import UserError
from lightning_mixcn.model import set_gradient_sync, shard_model

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
        timeout_minutes: How long a rank waits for the others in a collective before it stops with an error.
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
        """The mesh for `shard_model`.

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


# For `trainer.strategy: fsdp2`, without a class_path.
StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, the 4-bit base sharded over all ranks")
StrategyRegistry.register("hsdp", FSDP2Strategy, description="FSDP2 inside each node", shard_size="node")


def fsdp2_shard(strategy: Strategy | None) -> Shard | None:
    """What shards a model under FSDP2, `None` under any other strategy.

    Args:
        strategy: The trainer's, its ranks connected.

    Raises:
        ValueError: it asks for tensor parallelism.
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


def keep_base_whole(strategy: Strategy | None, module: LightningModule) -> None:
    """Tell DDP and FSDP1 to leave what is frozen alone: every rank has loaded it."""
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    # DDP would broadcast 25 GB that are there already. It looks for this attribute.
    module._ddp_params_and_buffers_to_ignore = list(frozen)  # type: ignore[assignment]  # nn.Module's __setattr__
    if isinstance(strategy, FSDPStrategy):
        strategy.kwargs.setdefault("ignored_states", list(frozen.values()))
        strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy({MixtralDecoderLayer}))


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Reduce gradients after the next backward, or not while micro-batches accumulate; DDP is Lightning's to tell.

    Args:
        model: The strategy's.
        wanted: Whether this is a step's last micro-batch.
    """
    set_gradient_sync(model, wanted)
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            setattr(module, "_sync_gradients", wanted)  # noqa: B010  # what its `no_sync()` sets; mypy takes it for a Tensor


def gradient_group(model: nn.Module | None) -> ProcessGroup | None:
    """Ranks whose plain gradient tensors are shares of one gradient: under FSDP1; `None` where they are whole."""
    return model.process_group if isinstance(model, FullyShardedDataParallel) else None


@contextmanager
def whole_parameters(model: nn.Module | None) -> Iterator[None]:
    """Within it, what FSDP1 shards is whole on every rank; to read, not to write."""
    if not isinstance(model, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield


def build_device(strategy: Strategy | None) -> torch.device:
    """Where a rank's model belongs: the strategy's device, or torch's default without a trainer."""
    return torch.get_default_device() if strategy is None else strategy.root_device
