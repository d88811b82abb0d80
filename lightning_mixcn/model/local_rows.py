"""A rank's share of a parameter: some of its rows under FSDP2, or all of them where nothing is sharded."""

from typing import Any, cast

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, without autograd, and the number of its first row.

    Args:
        parameter: A plain tensor, which is held whole, or a DTensor that is sharded along its first dimension.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    (dimension,) = (index for index, placement in enumerate(parameter.placements) if placement.is_shard(0))
    # As torch.chunk cuts: every rank has the same number of rows, and the last ones fewer or none.
    rows = -(-len(parameter) // parameter.device_mesh.size(dimension))
    first = min(rows * parameter.device_mesh.get_local_rank(dimension), len(parameter))
    return parameter.to_local().detach(), first


def copy_rows(parameter: Tensor, values: Tensor) -> None:
    """Fill a parameter, or this rank's share of it, from the whole values."""
    held, first = local_rows(parameter)
    held.copy_(values[first : first + len(held)])


def gathered(parameter: Tensor) -> Tensor:
    """The whole of a parameter, without autograd; all ranks must call it where it is sharded."""
    whole: Any = parameter.detach()
    return cast(Tensor, whole.full_tensor() if isinstance(whole, DTensor) else whole)


def held_elements(parameter: Tensor) -> range:
    """Elements of the flattened parameter that this rank holds."""
    held, first = local_rows(parameter)
    start = first * (parameter.numel() // max(1, len(parameter)))
    return range(start, start + held.numel())


def write_elements(parameter: Tensor, start: int, values: Tensor) -> None:
    """Copy flat values in from element `start` on; all of them are held here."""
    held, _ = local_rows(parameter)
    start -= held_elements(parameter).start
    held.view(-1)[start : start + values.numel()].copy_(values)
