"""Describe a run to `model.memory.plan`, from Lightning's strategy and the data module."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.kl_to_base import KLToBase
from lightning_mixcn.model.memory.budget import fitting_modes, usable_bytes
from lightning_mixcn.model.memory.layer import MicroBatch
from lightning_mixcn.model.memory.optimizer import OptimizerMemory, optimizer_memory
from lightning_mixcn.model.memory.plan import Run, Sharing

from .strategies import FSDP2Strategy, check_strategy

_NO_OPTIMIZER = OptimizerMemory(0, 0)


def micro_batch(data: Any) -> MicroBatch:
    """Return the shape of a data module's training batches.

    Args:
        data: One with ``micro_batch_size``, ``sequence_length`` and ``packing``, as this package's are.

    Raises:
        ValueError: it does not say.
    """
    rows, length = getattr(data, "micro_batch_size", None), getattr(data, "sequence_length", None)
    if rows is None or length is None:
        raise UserError(
            f"Memory is planned for `micro_batch_size` rows of `sequence_length` tokens, but {type(data).__name__} has "
            "no such attributes. Give your data module both, or leave out `activation_memory` and `--plan`"
        )
    return MicroBatch(rows, length, packed=getattr(data, "packing", "documents") != "concatenate")


def sharing_of(strategy: Strategy | str, ranks: int, ranks_of_node: int) -> Sharing:
    """Describe how a strategy shares parameters between ranks; no process group is needed.

    Args:
        strategy: Lightning's, or its name in a configuration.
        ranks: Number of ranks of the run.
        ranks_of_node: Number of ranks on each machine.

    >>> sharing_of("hsdp", ranks=16, ranks_of_node=8)
    Sharing(kind='fsdp2', ranks=8, copies=2, reshard_after_forward=True, prefetch=1, gradient_copies=0)
    """
    check_strategy(strategy)
    if strategy in ("fsdp", "fsdp2", "hsdp"):
        strategy = FSDP2Strategy(shard_size="node" if strategy == "hsdp" else "all")
    if isinstance(strategy, FSDP2Strategy):
        given = {"all": ranks, "node": ranks_of_node}
        size = given[strategy.shard_size] if isinstance(strategy.shard_size, str) else strategy.shard_size
        return Sharing("fsdp2", size, ranks // size, strategy.reshard_after_forward, strategy.prefetch)
    if isinstance(strategy, ModelParallelStrategy):
        return Sharing("fsdp2", ranks)
    if isinstance(strategy, DDPStrategy):
        return Sharing(copies=ranks, gradient_copies=int(not strategy._ddp_kwargs.get("gradient_as_bucket_view")))
    if isinstance(strategy, str) and (strategy.startswith("ddp") or (strategy == "auto" and ranks > 1)):
        return Sharing(copies=ranks, gradient_copies=1)
    return Sharing()


def planned_run(
    model: nn.Module,
    batch: MicroBatch,
    modes: list[str],
    device_type: str,
    accumulates: bool,
    sharing: Sharing,
    make_optimizer: Callable[[Any], Optimizer] | None,
    module: Any,
) -> Run:
    """Describe a run of a `CausalLMModule` to `plan_memory`; without ``make_optimizer`` the optimizer is left out."""
    kl_to_base: KLToBase | None = module.kl_to_base
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_memory(make_optimizer, trained, device_type) if make_optimizer else _NO_OPTIMIZER
    compares = kl_to_base is not None and kl_to_base["coefficient"] > 0
    return Run(batch, modes, device_type, accumulates, optimizer, sharing, compares, module.keeps_start)


def budgeted_modes(module: Any) -> list[str]:
    """Choose the activation checkpointing of each layer of a module with an ``activation_memory``.

    Args:
        module: A `CausalLMModule` with a trainer.

    Raises:
        ValueError: the budget is too small, or the data's shape or the optimizer's needs are not known.
    """
    trainer, budget = module.trainer, module.activation_memory
    device = trainer.strategy.root_device
    sharing = sharing_of(trainer.strategy, trainer.world_size, trainer.num_devices)
    # Only what the device has left depends on the optimizer.
    optimizer = module.make_optimizer if budget == "auto" else None
    accumulates = trainer.accumulate_grad_batches > 1
    batch = micro_batch(trainer.datamodule)
    run = planned_run(module.model, batch, [], device.type, accumulates, sharing, optimizer, module)
    return fitting_modes(module.model, run, budget, fewest_usable(trainer, device))


def fewest_usable(trainer: Any, device: torch.device) -> int:
    """Return the bytes of the rank that has least, so that all choose the same."""
    here = torch.tensor(usable_bytes(device, trainer.num_devices), dtype=torch.float64, device=device)
    return int(trainer.strategy.reduce(here, reduce_op="min"))
