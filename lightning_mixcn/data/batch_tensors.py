"""Batches as tensors that a GPU can fetch by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def batch_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Give a batch's arrays as tensors, page-locked where this process uses CUDA.

    Lightning copies a batch without waiting. That is so from page-locked memory only: from any other, CUDA lets the
    host wait until the device has done all that it was told before.

    Args:
        arrays: ``[B, S]`` each.

    Returns:
        The same, which share the arrays' memory where CUDA is not in use.
    """
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return tensors
