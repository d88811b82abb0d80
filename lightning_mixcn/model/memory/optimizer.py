"""Count the bytes of an optimizer by making it and taking one step on parameters without memory."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mixcn.errors import UserError


class MemoryTracker(TorchDispatchMode):
    """Memory tracker: follows every storage that an operation makes until the last tensor on it is gone.

    What was there before is not counted, nor what a kernel allocates and frees inside one operation.

    >>> with MemoryTracker() as live:
    ...     a = torch.zeros(1000)
    ...     b = a.view(10, 100) + 1
    ...     del a
    >>> live.now, live.peak
    (4000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, counted=False)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._follow(tensor, counted=True)
        return result

    def _follow(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes() if counted else 0
        weakref.finalize(storage, self._forget, key)
        self.now += self._seen[key]
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class OptimizerMemory(NamedTuple):
    """Bytes of an optimizer.

    Args:
        states: From its first step on: moments, and what 8-bit ones are scaled with.
        workspace: The most that an update needs beside them.
    """

    states: int
    workspace: int


def optimizer_memory(
    make: Callable[[Any], Optimizer], parameters: Iterable[Tensor], device_type: str
) -> OptimizerMemory:
    """Count an optimizer's bytes.

    Args:
        make: Function that makes it from parameters, as `CausalLMModule`'s argument ``optimizer``.
        parameters: Parameters that train, on any device; only their shapes count.
        device_type: On ``cuda`` torch's optimizers update all parameters in one go, unless told otherwise, which takes
            temporary copies of all of them.

    Raises:
        ValueError: it cannot step without memory.

    >>> weight = torch.empty(64, 64, device="meta")
    >>> optimizer_memory(torch.optim.AdamW, [weight], "cpu").states  # two moments, and the number of the step
    32772
    """
    # Constructors may compute, so they get real parameters of one element, which are exchanged afterwards.
    shapes = [parameter.shape for parameter in parameters]
    stand_ins = [nn.Parameter(torch.zeros((1,) * len(shape))) for shape in shapes]
    optimizer = make(stand_ins)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {stand_in: _fake(shape) for stand_in, shape in zip(stand_ins, shapes, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [fakes[stand_in] for stand_in in group["params"]]
            if device_type == "cuda" and group.get("foreach") is None and not group.get("fused"):
                group["foreach"] = "foreach" in group
        optimizer.is_paged = False  # type: ignore[attr-defined]  # bitsandbytes' paged ones would ask CUDA for memory
        try:
            with MemoryTracker() as live:
                optimizer.step()
                states, peak = live.now, live.peak
        except (RuntimeError, NotImplementedError) as error:
            name = type(optimizer).__name__
            raise UserError(
                f"`optimizer`: what {name} needs cannot be planned ({type(error).__name__}). Leave out what needs the "
                "plan, `--plan` or `activation_memory: auto`"
            ) from error
    return OptimizerMemory(states, peak - states)


def _fake(shape: torch.Size) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape))
    parameter.grad = torch.empty_like(parameter)
    return parameter
