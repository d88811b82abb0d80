"""Tensors that autograd saves, in the host's memory: copied while the GPU goes on, fetched when backward asks."""

from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostCopy:
    """A tensor of a GPU in pinned memory of the host.

    The copy runs on a stream of its own. `record_stream` keeps the tensor's memory from being given away before it is
    done, and the event keeps `fetch` from reading before.

    Args:
        tensor: On a CUDA device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._device, stream = tensor.device, _copy_stream(tensor.device)
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # whatever computes the tensor
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self._copied = stream.record_event()

    def fetch(self) -> Tensor:
        """The tensor, on its device again.

        On the stream that needs it: in a row of 128 K tokens a layer of Mixtral-8x7B fetches 8 KB a token and computes
        7 GFLOP, so waiting takes one or two percent of the time.
        """
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        return self._host.to(self._device, non_blocking=True)


def kept_on_host() -> saved_tensors_hooks:
    """Within it, what autograd saves goes to the host."""
    return saved_tensors_hooks(HostCopy, HostCopy.fetch)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
