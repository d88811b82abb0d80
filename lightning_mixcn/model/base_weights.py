"""A base's weights, one matrix at a time: as its checkpoint stores them, or as 4 bits hold them."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from .bitsandbytes_source import BitsAndBytesSource
from .checkpoint import Checkpoint, Segment
from .frozen_linear import FrozenLinear
from .layout import Entry, disk_names
from .loading import is_quantised, mixtral_config, open_entries, pieces, torch_dtype
from .mixtral import meta_model
from .nf4 import dequantize
from .weights import NF4Weight


class BaseWeights:
    """Every weight of a Mixtral, read when it is asked for.

    Args:
        checkpoint: High-precision, or 4-bit folder.
        dequantised: Give attention and experts as NF4 rounds them, which is what `load_mixtral` computes with. A 4-bit
            folder has nothing else.

    Attributes:
        config: The base's.
        modules: The modules that have a weight, in the model's order: name → names of its matrices on disk (one an
            expert).

    Raises:
        ValueError: another architecture, a missing weight, or the wrong shape.
    """

    def __init__(self, checkpoint: Checkpoint, *, dequantised: bool) -> None:
        """Check every name and shape."""
        self._checkpoint, self._stored = checkpoint, is_quantised(checkpoint)
        assert dequantised or not self._stored, "a 4-bit folder has dequantised weights only"
        self.config = mixtral_config(checkpoint)
        model = meta_model(self.config, "nf4" if dequantised else "none", torch.float32)
        todo, self._source = open_entries(model, checkpoint, self.config)
        self._entries: dict[str, list[Entry]] = {}
        for entry in todo:
            self._entries.setdefault(entry.name.removesuffix(".storage"), []).append(entry)
        self._modules = {name: model.get_submodule(name) for name in self._entries}
        self.modules = {name: disk_names(name, self._groups(name)) for name in self._entries}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one matrix (or vector) of a module."""
        module = self._modules[name]
        if isinstance(module, FrozenLinear):
            return module.out_features, module.in_features
        return tuple(self._entries[name][0].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a module's weight in the checkpoint; of 4-bit weights, the one that the folder has beside them."""
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
            yield dequantize(source.stack(entry), torch.float32)[: prod(entry.shape)].view(self.shape(name))
            return
        segments: Sequence[Segment] = entry.segments
        numel = prod(self.shape(name))
        for group in range(self._groups(name)):
            # Experts that lie in one tensor each are read as such; a stored stack has them one after the other.
            part, first = ([segments[group]], 0) if len(segments) > 1 else (segments, group * numel)
            values = self._checkpoint.read_segments(part, first, first + numel)
            if not torch.isfinite(values).all():
                raise ValueError(f"{self._checkpoint.path}: {part[0].name} holds NaN or infinite values")
            yield values.view(self.shape(name))

    def _groups(self, name: str) -> int:
        module = self._modules[name]
        return module.groups if isinstance(module, FrozenLinear) else 1

    def _is_nf4(self, name: str) -> bool:
        module = self._modules[name]
        return isinstance(module, FrozenLinear) and isinstance(module.storage, NF4Weight)

    def _packed(self, name: str) -> BitsAndBytesSource | None:
        """Return bitsandbytes' weights if the module's are among them."""
        return self._source if self._source is not None and self._source.holds(self._entries[name][0]) else None

    def _nf4(self, name: str) -> NF4Weight:
        """The module's stack of matrices in 4 bits: read, or quantised now."""
        module = self._modules[name]
        assert isinstance(module, FrozenLinear)
        storage = NF4Weight(module.storage.shape)
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
