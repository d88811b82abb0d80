"""Which optimizers can hold their states under which strategy."""

from bitsandbytes.optim.optimizer import Optimizer8bit
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch.optim import Optimizer


def check_optimizer(optimizer: Optimizer, strategy: Strategy) -> None:
    """Refuse bitsandbytes' optimizers where FSDP shards what trains.

    Their kernels know no DTensor: FSDP2's first step fails on the CPU and corrupts memory on CUDA (bitsandbytes, issue
    1633). Under FSDP1 they would train, but each rank's states are kept from the gathering that a checkpoint needs.

    Args:
        optimizer: Of what trains.
        strategy: Lightning's.

    Raises:
        ValueError: says what to use instead.
    """
    # The base class of all of bitsandbytes' optimizers, those with 32-bit states too.
    if isinstance(optimizer, Optimizer8bit) and isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"`model.init_args.optimizer`: bitsandbytes' {type(optimizer).__name__} cannot hold states of parameters "
            f"that {type(strategy).__name__} shards. Use torch.optim.AdamW, whose states are sharded with them, or "
            "one GPU or DDP (`trainer.strategy: auto` or configs/trainer/ddp.yaml)"
        )
