"""A base and its adapters as one set of weights, ``W + Σ s·B·A``, one tensor after the other.

Legend: E = experts, H = hidden, I = intermediate.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .adapter_file import EMBEDDINGS, AdapterFile
from .base_weights import BaseWeights
from .vocabulary_extension import adapter_rows

Layout = Literal["per-expert", "fused"]


class MergedWeights:
    """What an exported checkpoint holds.

    Sums are computed in float32 and rounded once. Nothing is read before `tensors` comes to it.

    Args:
        base: The base's weights.
        adapters: Applied one on top of the other, in order; of an embedding that several of them trained, the last
            counts. One that was trained with an extended vocabulary has more rows than the base.
        layout: Names of the experts' weights: ``per-expert`` (``block_sparse_moe.experts.N.w1.weight``) or ``fused``
            (``mlp.experts.gate_up_proj [E, 2I, H]``).
        dtype: Of the result; ``None`` keeps each tensor's.

    Attributes:
        vocab_size: Rows of embedding and head.

    Raises:
        ValueError: an adapter does not fit the base.
    """

    def __init__(
        self, base: BaseWeights, adapters: Sequence[AdapterFile], layout: Layout, dtype: torch.dtype | None
    ) -> None:
        """Check that every factor has its matrix."""
        self._base, self._adapters, self._layout, self._dtype = base, adapters, layout, dtype
        self._shapes = {name: base.shape(module) for module, names in base.modules.items() for name in names}
        self.vocab_size: int = base.config.vocab_size
        for adapter in adapters:
            tied = base.config.tie_word_embeddings
            self.vocab_size = max(self.vocab_size, adapter_rows(adapter, tied=tied) or 0)
            self._shapes |= {name: (self.vocab_size, *self._shapes[name][1:]) for name in EMBEDDINGS[: 2 - tied]}
            _check_fit(adapter, self._shapes, tied=tied)

    def dtype(self, module: str) -> torch.dtype:
        """Type of a module's weight in the result."""
        return self._dtype or self._base.dtype(module)

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(
            prod(self._shapes[name]) * self.dtype(module).itemsize
            for module, names in self._base.modules.items()
            for name in names
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name; at most one layer's projection is in memory."""
        for module in self._base.modules:
            layer, experts, leaf = module.partition(".mlp.experts.")
            if not experts or self._layout == "per-expert":
                yield from self._single(module)
            elif leaf == "gate_proj":
                yield f"{layer}.mlp.experts.gate_up_proj", self._stack([module, f"{layer}.mlp.experts.up_proj"])
            elif leaf == "down_proj":
                yield f"{layer}.mlp.experts.down_proj", self._stack([module])

    def _single(self, module: str) -> Iterator[tuple[str, Tensor]]:
        for name, matrix in zip(self._base.modules[module], self._base.matrices(module), strict=True):
            exported = name.replace(".block_sparse_moe.", ".mlp.") if self._layout == "fused" else name
            yield f"{exported}.weight", self._merged(module, name, matrix)

    def _stack(self, modules: list[str]) -> Tensor:
        """``[E, rows of all modules, in]``."""
        names = [self._base.modules[module] for module in modules]
        rows, columns = self._base.shape(modules[0])
        stack = torch.empty(len(names[0]), rows * len(modules), columns, dtype=self.dtype(modules[0]))
        for place, module in enumerate(modules):
            for expert, matrix in enumerate(self._base.matrices(module)):
                stack[expert, place * rows : (place + 1) * rows] = self._merged(module, names[place][expert], matrix)
        return stack

    def _merged(self, module: str, name: str, matrix: Tensor) -> Tensor:
        """One matrix with what the adapters make of it."""
        for adapter in self._adapters:
            if name in adapter.saved:
                matrix = adapter.read_saved(name)
            elif name in adapter.names:
                matrix = adapter.delta(name).add_(matrix)
        result = matrix.to(self.dtype(module))
        if not torch.isfinite(result).all():
            raise ValueError(
                f"{name} is NaN or infinite in {str(result.dtype).removeprefix('torch.')} once merged. "
                "Give `--dtype` float32 or bfloat16"
            )
        return result


def _check_fit(adapter: AdapterFile, shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Every factor and embedding has a matrix of its shape in the base."""
    path = str(adapter.folder)
    for name in [*adapter.names, *adapter.saved]:
        shape = adapter.shape(name)
        if tied and name == "lm_head":
            both = [adapter.read_saved(key) for key in adapter.saved]
            if len(both) < len(EMBEDDINGS) or not torch.equal(*both):
                raise ValueError(f"`adapter={path!r}` trains lm_head apart from embed_tokens, which the base ties")
        elif name not in shapes:
            raise ValueError(f"`adapter={path!r}` adapts {name}, which the base does not have. Give its own base")
        elif shape != shapes[name]:
            raise ValueError(
                f"`adapter={path!r}`: {name} has the shape {list(shape)}, the base has {list(shapes[name])}. "
                "Give the base that the adapter was trained on"
            )
