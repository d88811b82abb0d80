"""What a step launches, counted on the meta device: kind, bytes and products of every kernel, and waits of the host.

Bytes are those of a kernel's arguments and results, each moved once; what a kernel overwrites moves twice. A gather
moves what it gathers, a fill what it writes, an expanded tensor what is stored of it. Caches count nothing. One
operation of torch is one launch, although some of them (sorting, say) are several.

Legend of products: ``[m, k] @ [k, n]``, ``groups`` times.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("frozen product", "LoRA and router", "attention", "element-wise", "decoding", "host copy")

_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "baddbmm": (1, 2)}
_NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "lift_fresh", "is_same_size", "record_stream",
}  # fmt: skip
_WRITES = {"zero_", "fill_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "new_full"}
_GATHERS = {"index", "index_select", "embedding", "gather"}
_SCATTERS = {"index_copy_", "index_add_", "scatter_", "scatter_add_"}
_SLICE_GRADIENTS = {"slice_backward", "select_backward"}


@dataclass(frozen=True)
class Work:
    """One kernel.

    Args:
        name: Of the operation, or of the Triton kernel.
        kind: One of `KINDS`.
        phase: ``forward``, ``backward`` (with what is computed again) or ``optimizer``.
        bytes: Read and written.
        flops: Of its products.
        shape: ``(m, k, n, groups)`` of a product, else empty.
        side: It runs on a second stream.
    """

    name: str
    kind: str
    phase: str
    bytes: int
    flops: int = 0
    shape: tuple[int, ...] = ()
    side: bool = False


class Trace(TorchDispatchMode):
    """Collect the work of what runs on the meta device while this is active.

    Args:
        rank: LoRA's; a product one of whose sizes is at most three ranks is one of LoRA's (or of the router).
        pairs: Pairs of a token and one that it attends to, of one head.
    """

    def __init__(self, rank: int, pairs: int) -> None:
        super().__init__()
        self.rank, self.pairs = rank, pairs
        self.phase, self.side = "forward", False
        self.works: list[Work] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its work."""
        result = func(*args, **(kwargs or {}))
        on_card = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs, result)))
        name = func._schema.name.split("::")[-1]
        if on_card and not func.is_view and name not in _NOTHING:
            self._add(name, func._schema, args, kwargs or {}, result)
        return result

    def wait(self, where: str) -> None:
        """Count a wait of the host for the device."""
        self.waits.append(self.phase)

    def add(self, name: str, kind: str, moved: int, flops: int = 0, shape: tuple[int, ...] = ()) -> None:
        """Add a kernel that torch's dispatcher does not see."""
        self.works.append(Work(name, kind, self.phase, moved, flops, shape, self.side))

    def launch(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Add the kernel that a function of `lightning_mixcn.model.kernels` launches; nothing without tensors."""
        name, given = function.__name__, inspect.signature(function).bind(*args, **kwargs).arguments
        if not _tensors((given, result)):
            return
        shape = _kernel_product(name, given) if _multiplies(function) else ()
        kind = "frozen product" if shape else "decoding" if "decode" in name else "element-wise"
        self.add(name, kind, _kernel_bytes(name, given, result), _flops(shape), shape)

    def _add(self, name: str, schema: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        moved = _bytes_moved(name, schema, args, kwargs, result)
        if name in _PRODUCTS or "grouped_mm" in name:
            shape = _grouped(args, kwargs) if "grouped_mm" in name else _shape(*(args[i] for i in _PRODUCTS[name]))
            small = min(shape[:3]) <= 3 * self.rank
            self.add(name, "LoRA and router" if small else "frozen product", moved, _flops(shape), shape)
        elif "varlen_attn" in name or "flash_attention" in name:
            heads, size = (args[1] if "backward" in name else args[0]).shape[-2:]
            # FlashAttention computes the scores again in backward: five products instead of two.
            self.add(name, "attention", moved, (5 if "backward" in name else 2) * 2 * heads * size * self.pairs)
        else:
            self.add(name, "decoding" if name.startswith("dequantize") else "element-wise", moved)


def _flops(shape: tuple[int, ...]) -> int:
    return 2 * shape[0] * shape[1] * shape[2] * shape[3] if shape else 0


def _shape(left: Tensor, right: Tensor) -> tuple[int, ...]:
    return (left.shape[-2], left.shape[-1], right.shape[-1], left.shape[0] if left.dim() == 3 else 1)


def _grouped(args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of a grouped product, its rows shared evenly."""
    left, right = args[0], args[1]
    groups = len(kwargs.get("offs") if kwargs.get("offs") is not None else args[2])
    if right.dim() == 3:
        return (left.shape[0] // groups, left.shape[1], right.shape[2], groups)
    return (left.shape[0], left.shape[1] // groups, right.shape[1], groups)


def stored_bytes(tensor: Tensor) -> int:
    """Count a tensor's bytes, an expanded dimension once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * torch.Size(size if stride or size == 0 else 1 for size, stride in sizes).numel()


def _tensors(tree: Any) -> list[Tensor]:
    found = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return list(found.values())


def _bytes_moved(name: str, schema: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Count what an operation of torch reads and writes."""
    written = sum(map(stored_bytes, _tensors(result)))
    if name in _WRITES:
        return written
    if name in _GATHERS:
        return 2 * written + sum(stored_bytes(t) for t in _tensors((args[1:], kwargs)) if not t.is_floating_point())
    if name in _SLICE_GRADIENTS:  # zeros, and then the slice
        return written + 2 * stored_bytes(args[0])
    if name in _SCATTERS:
        return stored_bytes(args[2]) + (3 if "add" in name else 2) * stored_bytes(args[3])
    if name == "_fused_adamw_":  # parameters and moments change, gradients are read
        return 7 * sum(map(stored_bytes, _tensors(args[1])))
    if name == "copy_":
        return written + stored_bytes(args[1])
    places = {id(tensor) for tensor in _tensors(result)}
    read = sum(stored_bytes(tensor) for tensor in _tensors((args, kwargs)) if id(tensor) not in places)
    return read + written + _overwritten(schema, args)


def _overwritten(schema: Any, args: Any) -> int:
    """Count once more what is changed in place; a result that the caller gives (``out=``) is written only."""
    changed = [
        value
        for argument, value in zip(schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
    ]
    return sum(map(stored_bytes, _tensors(changed)))


def _kernel_bytes(name: str, given: dict[str, Any], result: Any) -> int:
    """Count the arguments and results of a Triton kernel, of larger arguments what it touches."""
    # What is given as ``out`` is written, also where the function returns it; where it is an input, too, it is read.
    read = _tensors([value for argument, value in given.items() if argument != "out"])
    moved = sum(map(stored_bytes, read)) + sum(map(stored_bytes, _tensors((result, given.get("out")))))
    if name == "decode_operand":  # one matrix of a stack
        stack = sum(map(stored_bytes, given["packed"]))
        moved -= stack - stack // given["shape"][0]
    if name == "gather_rows":
        x = given["x"]
        moved -= stored_bytes(x) * (len(x) - len(given["token"])) // len(x)
    return moved


def _kernel_product(name: str, given: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of the products that a Triton kernel makes.

    Raises:
        NotImplementedError: a kernel that multiplies and is not known here.
    """
    if name != "nf4_product":
        raise NotImplementedError(f"{name!r} multiplies, and the shape of its product is not known: add it here")
    experts, width_out, width_in = given["shape"]
    rows = len(given["rows"]) // experts
    return (rows, width_in, width_out, experts) if given["transposed"] else (rows, width_out, width_in, experts)


@cache
def _multiplies(function: Callable[..., Any]) -> bool:
    return "tl.dot(" in inspect.getsource(inspect.getmodule(function) or function)
