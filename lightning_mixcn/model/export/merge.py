"""Merge a base and its adapters, ``W + Σ s·B·A``, one tensor after the other.

Legend: E = experts, H = hidden, I = intermediate.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.model.architectures import architecture_of
from lightning_mixcn.model.checkpoints.bitsandbytes import BitsAndBytesSource
from lightning_mixcn.model.checkpoints.folder import Checkpoint, TensorSlice
from lightning_mixcn.model.checkpoints.identity import check_made_from, read_identity
from lightning_mixcn.model.checkpoints.layout import StoredWeight, disk_names, module_shapes, rounds
from lightning_mixcn.model.checkpoints.reading import (
    is_quantised,
    model_config,
    pieces,
    torch_dtype,
)
from lightning_mixcn.model.find import ModelSource
from lightning_mixcn.model.loading import open_entries
from lightning_mixcn.model.lora.adapter_file import EMBEDDINGS, AdapterFile
from lightning_mixcn.model.nf4.codec import dequantize_nf4
from lightning_mixcn.model.nf4.storage import NF4Weight


class BaseWeights:
    """The weights of a base, each read when it is asked for.

    Args:
        checkpoint: High-precision, or 4-bit folder.
        dequantised: Give attention and experts as NF4 rounds them, which is what `load_moe` computes with. A 4-bit
            folder has nothing else.

    Attributes:
        config: The base's.
        architecture: Its family.
        dequantised: As it was given.
        modules: The modules that have a weight, in the model's order: name → names of its matrices on disk (one an
            expert).

    Raises:
        ValueError: another architecture, a missing weight, or the wrong shape.
    """

    def __init__(self, checkpoint: Checkpoint, *, dequantised: bool) -> None:
        """Check every name and shape."""
        self._checkpoint, self._stored = checkpoint, is_quantised(checkpoint)
        assert dequantised or not self._stored, "a 4-bit folder has dequantised weights only"
        self.config = model_config(checkpoint)
        self.dequantised, self._shapes = dequantised, module_shapes(self.config)
        todo, self._source = open_entries(checkpoint, self.config)
        self._entries: dict[str, list[StoredWeight]] = {}
        for entry in todo:
            self._entries.setdefault(entry.name.removesuffix(".storage"), []).append(entry)
        self.architecture = architecture_of(self.config)
        self.modules = {name: disk_names(self.architecture, name, self._groups(name)) for name in self._entries}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one matrix (or vector) of a module."""
        shape = self._shapes[name]
        return shape[1:] if len(shape) == 3 else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a module's weight in the checkpoint; of 4-bit weights, that of the other weights."""
        segment = self._entries[name][0].segments[0].name
        if (self._stored and self._is_nf4(name)) or self._packed(name) is not None:
            settings = self._checkpoint.config  # transformers 4, which wrote bitsandbytes' folders, says torch_dtype
            return torch_dtype(str(settings.get("dtype") or settings.get("torch_dtype") or "bfloat16"))
        return self._checkpoint.dtype(segment)

    def matrices(self, name: str) -> Iterator[Tensor]:
        """Read a module's matrices one after the other, private copies; float32 where they come out of 4 bits."""
        if self._is_nf4(name):
            decode = self._nf4(name).decoder(torch.float32)
            yield from (decode(group) for group in range(self._groups(name)))
            return
        (entry,) = self._entries[name]
        if (source := self._packed(name)) is not None:  # a router that bitsandbytes quantised
            yield dequantize_nf4(source.stack(entry), torch.float32)[: prod(entry.shape)].view(self.shape(name))
            return
        segments: Sequence[TensorSlice] = entry.segments
        numel = prod(self.shape(name))
        for group in range(self._groups(name)):
            # Experts that lie in one tensor each are read as such; a stored stack has them one after the other.
            part, first = ([segments[group]], 0) if len(segments) > 1 else (segments, group * numel)
            values = self._checkpoint.read_segments(part, first, first + numel)
            if not _is_finite(values):
                raise UserError(f"{self._checkpoint.path}: {part[0].name} holds NaN or infinite values")
            yield values.view(self.shape(name))

    def _groups(self, name: str) -> int:
        shape = self._shapes[name]
        return shape[0] if len(shape) == 3 else 1

    def _is_nf4(self, name: str) -> bool:
        return self.dequantised and rounds(name, self._shapes[name])

    def _packed(self, name: str) -> BitsAndBytesSource | None:
        """Return bitsandbytes' weights if the module's are among them."""
        return self._source if self._source is not None and self._source.holds(self._entries[name][0]) else None

    def _nf4(self, name: str) -> NF4Weight:
        """Return the module's stack of matrices in 4 bits: read, or quantised now."""
        groups, rows, columns = self._shapes[name]
        storage = NF4Weight((groups, rows, columns))
        if (source := self._packed(name)) is not None:
            storage.load_state_dict(source.stack(self._entries[name][0])._asdict())
        elif self._stored and self._source is None:
            storage.load_state_dict(
                {str(entry.attribute): self._checkpoint.read(entry.segments[0].name) for entry in self._entries[name]}
            )
        else:
            for start, values in pieces(self._entries[name][0], self._checkpoint):
                storage.write(start, values)
        return storage


def _is_finite(values: Tensor) -> bool:
    """Tell it by the extremes, which takes no memory; `torch.isfinite` takes twice that of 16-bit values."""
    return bool(torch.stack(values.aminmax()).isfinite().all())


Layout = Literal["per-expert", "fused"]


class AddedDifference(Protocol):
    """A further model whose difference from the base is added, see `InstructDelta`."""

    def matrices(self, module: str) -> Iterator[Tensor]:
        """Read its matrices of a module one after the other."""

    def add(self, name: str, values: Tensor, base: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
        """Add what lies between a matrix of it and the base's to ``values``, in float32, rounded once."""


class MergedWeights:
    """The weights of an exported checkpoint.

    Sums are computed in float32 and rounded once. Nothing is read before `tensors` comes to it.

    Args:
        base: The base's weights.
        adapters: Applied one on top of the other, in order; of an embedding that several of them trained, the last
            counts. One that was trained with an extended vocabulary has more rows than the base.
        layout: Names of the experts' weights: ``per-expert``, as the family's published files have them, or ``fused``
            (``mlp.experts.gate_up_proj [E, 2I, H]``).
        dtype: Dtype of the result; ``None`` keeps each tensor's.
        difference: Added after the adapters; ``None`` for nothing.

    Attributes:
        vocab_size: Rows of embedding and head.

    Raises:
        ValueError: an adapter does not fit the base.
    """

    def __init__(
        self,
        base: BaseWeights,
        adapters: Sequence[AdapterFile],
        layout: Layout,
        dtype: torch.dtype | None,
        difference: AddedDifference | None = None,
    ) -> None:
        """Check that every factor has its matrix."""
        if base.dequantised:  # on which the first was trained, those after it on what it gives
            adapters = [*(adapter.on_rounded_base() for adapter in adapters[:1]), *adapters[1:]]
        self._base, self._adapters, self._layout, self._dtype = base, adapters, layout, dtype
        self._difference = difference
        self._shapes = {name: base.shape(module) for module, names in base.modules.items() for name in names}
        self.vocab_size: int = base.config.vocab_size
        for adapter in adapters:
            tied = base.config.tie_word_embeddings
            self.vocab_size = max(self.vocab_size, adapter.vocabulary_rows(tied=tied) or 0)
            self._shapes |= {name: (self.vocab_size, *self._shapes[name][1:]) for name in EMBEDDINGS[: 2 - tied]}
            _check_fit(adapter, self._shapes, tied=tied)

    def dtype(self, module: str) -> torch.dtype:
        """Return the type of a module's weight in the result."""
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
        """Yield every tensor with its name; at most one layer's projection is in memory."""
        for module in self._base.modules:
            layer, experts, leaf = module.partition(".mlp.experts.")
            if not experts or self._layout == "per-expert":
                yield from self._single(module)
            elif leaf == "gate_proj":
                yield f"{layer}.mlp.experts.gate_up_proj", self._stack([module, f"{layer}.mlp.experts.up_proj"])
            elif leaf == "down_proj":
                yield f"{layer}.mlp.experts.down_proj", self._stack([module])

    def _single(self, module: str) -> Iterator[tuple[str, Tensor]]:
        for name, merged in zip(self._base.modules[module], self._merged(module), strict=True):
            exported = name.replace(f".{self._base.architecture.block}.", ".mlp.") if self._layout == "fused" else name
            yield f"{exported}.weight", merged

    def _stack(self, modules: list[str]) -> Tensor:
        """Return ``[E, rows of all modules, in]``."""
        rows, columns = self._base.shape(modules[0])
        experts = len(self._base.modules[modules[0]])
        stack = torch.empty(experts, rows * len(modules), columns, dtype=self.dtype(modules[0]))
        for place, module in enumerate(modules):
            for expert, matrix in enumerate(self._merged(module)):
                stack[expert, place * rows : (place + 1) * rows] = matrix
        return stack

    def _merged(self, module: str) -> Iterator[Tensor]:
        """Yield a module's matrices with the adapters, and the difference, merged into them."""
        others = None if self._difference is None else self._difference.matrices(module)
        for name, matrix in zip(self._base.modules[module], self._base.matrices(module), strict=True):
            yield self._sum(name, matrix, None if others is None else next(others), self.dtype(module))

    def _sum(self, name: str, matrix: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
        values = matrix
        for adapter in self._adapters:
            if name in adapter.saved:
                values = adapter.read_saved(name)
            elif name in adapter.names:
                values = adapter.delta(name).add_(values)
        if other is None or self._difference is None:
            result = values.to(dtype)
        else:
            result = self._difference.add(name, values, matrix, other, dtype)
        if not _is_finite(result):
            raise UserError(
                f"{name} is NaN or infinite in {str(result.dtype).removeprefix('torch.')} once merged. "
                "Give `--dtype` float32 or bfloat16"
            )
        return result


def _check_fit(adapter: AdapterFile, shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Check that every factor and embedding has a matrix of its shape in the base."""
    path = str(adapter.folder)
    for name in [*adapter.names, *adapter.saved]:
        shape = adapter.shape(name)
        if tied and name == "lm_head":  # equal to embed_tokens, see `vocabulary_rows`
            continue
        if name not in shapes:
            raise UserError(f"`adapter={path!r}` adapts {name}, which the base does not have. Give its own base")
        if shape != shapes[name]:
            raise UserError(
                f"`adapter={path!r}`: {name} has the shape {list(shape)}, the base has {list(shapes[name])}. "
                "Give the base that the adapter was trained on"
            )


Precision = Literal["original", "dequantised"]


def merge_base(found: ModelSource, precision: Precision, original: str | None) -> Checkpoint:
    """Find the checkpoint that adapters are merged onto.

    Args:
        found: The model.
        precision: ``original``: the high-precision weights; ``dequantised``: as 4 bits round them.
        original: Folder or hub id of the high-precision weights, if not where the model says.

    Returns:
        The checkpoint; for ``original`` an unquantised one.

    Raises:
        FileNotFoundError: the base is in 4 bits, and what it was made from is not there.
        ValueError: `original` is another base, in 4 bits itself, or given for dequantised weights.
    """
    base = found.base
    if precision == "dequantised":
        if original is not None:
            raise UserError(f"`original={original!r}` is not used by `base=dequantised`. Leave out one of the two")
        return base
    if original is not None:
        weights = Checkpoint(original)
        if is_quantised(weights):
            raise UserError(f"`original={original!r}` is in 4 bits. Give the unquantised model")
    elif is_quantised(base):
        weights = _recorded_original(base)
        if is_quantised(weights):
            raise UserError(
                f"the base {str(base.path)!r} was made from {weights.name!r}, which bitsandbytes quantised: there is "
                "no unquantised one to merge onto. Give `--base dequantised`, or the published base with "
                "`--original FOLDER`"
            )
    else:
        return base
    # What was trained on 4 bits names those as its base, and they name what they were made from.
    for folder in [base.path] if is_quantised(base) else [adapter.folder for adapter in found.adapters[:1]]:
        check_made_from(folder, weights)
    return weights


def _recorded_original(base: Checkpoint) -> Checkpoint:
    """Open what a 4-bit folder was quantised from."""
    recorded = read_identity(base.path)
    where = f"made from {recorded['path']!r}, which is not there" if recorded else "and does not say of what"
    reason = None
    if recorded is not None:
        try:
            local_folder(recorded["path"])
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = error
        else:
            return Checkpoint(recorded["path"])
    raise MissingFileError(
        f"the base {str(base.path)!r} is in 4 bits, {where}. Give the unquantised base with "
        "`--original FOLDER`, or `--base dequantised` to merge onto what the 4 bits hold"
    ) from reason
