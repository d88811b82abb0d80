"""Take over a checkpoint that bitsandbytes quantised (transformers 4: one ``Linear4bit`` an expert) bit for bit.

Its format is ours but for one thing: the second level has one offset a tensor, where a superblock has its own here. So
codes, scales and second-level scales are copied, and each superblock gets the tensor's offset. That needs every matrix
to fill whole superblocks, as those of real models do.

Legend: N = superblocks.
"""

from math import prod
from typing import Any

import bitsandbytes.functional as bnb
import torch

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.json_object import parse_object
from lightning_mixcn.files.schema import each, real, record, whole
from lightning_mixcn.model.nf4.codec import (
    BLOCK,
    BLOCKS_PER_SUPERBLOCK,
    SUPERBLOCK,
    NF4Tensors,
)

from .folder import Checkpoint
from .layout import StoredWeight

_TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__nf4"
_BLOCK = whole(1, 2**16)
_STRUCTURE = record(
    {
        "shape": each(whole(1, 2**24), 2),
        "blocksize": _BLOCK,
        "nested_blocksize": _BLOCK,
        "nested_offset": real(-1e30, 1e30),
    }
)


def is_bitsandbytes(checkpoint: Checkpoint) -> bool:
    """Tell whether bitsandbytes quantised a checkpoint, in whatever format."""
    return bool((checkpoint.config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes")


class BitsAndBytesSource:
    """The 4-bit weights of such a checkpoint.

    Args:
        checkpoint: Opened folder.

    Raises:
        ValueError: it is in 8 bits, FP4, or without double quantisation, which ours would have to round.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check the format."""
        self._checkpoint = checkpoint
        settings = checkpoint.config["quantization_config"]
        expected = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        for key, value in expected.items():
            if settings.get(key) != value:
                raise UserError(
                    f"{checkpoint.path} was quantised by bitsandbytes with {key}={settings.get(key)!r}, expected "
                    f"{value!r}. Quantise the original instead: this would have to be rounded once more"
                )

    def __contains__(self, name: str) -> bool:
        """Tell whether the weight of this name is in 4 bits; modules that were skipped are not."""
        return f"{name}.{_STATE}" in self._checkpoint

    def holds(self, entry: StoredWeight) -> bool:
        """Tell whether a weight, or a part of one, is in 4 bits."""
        return any(segment.name in self for segment in entry.segments)

    def names(self, entry: StoredWeight) -> list[str]:
        """Return the names of all tensors that a weight in 4 bits is stored in."""
        parts = [segment.name for segment in entry.segments]
        return [*parts, *(f"{name}.{key}" for name in parts for key in (*_TABLES, _STATE))]

    def check(self, entry: StoredWeight) -> None:
        """Check that every part of an entry is there in 4 bits and fits. ValueError if not."""
        shape = tuple(entry.shape[-2:])
        for segment in entry.segments:
            if segment.name not in self or self.shape(segment.name) != shape:
                raise UserError(
                    f"{self._checkpoint.path}: {segment.name} is not in 4 bits of shape {shape}. Is config.json of "
                    "this model?"
                )

    def stack(self, entry: StoredWeight) -> NF4Tensors:
        """Return all matrices of a weight as they are stored, one after the other. See `packed`."""
        return NF4Tensors(*map(torch.cat, zip(*(self.packed(part.name) for part in entry.segments), strict=True)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the weight before it was quantised."""
        return tuple(self._state(name)["shape"])

    def packed(self, name: str) -> NF4Tensors:
        """Return the weight as it is stored, in our four tensors.

        Raises:
            ValueError: other blocks or tables than NF4's, or no whole number of superblocks.
        """
        state, where = self._state(name), f"{self._checkpoint.path}: {name}"
        numel = prod(state["shape"])
        if (state["blocksize"], state["nested_blocksize"]) != (BLOCK, BLOCKS_PER_SUPERBLOCK):
            raise UserError(
                f"{where} has blocks of {state['blocksize']} and {state['nested_blocksize']}, not 64 and 256"
            )
        if numel % SUPERBLOCK:
            raise UserError(
                f"{where} has {numel:,} elements, no multiple of {SUPERBLOCK:,}, so that it cannot be taken over as it "
                "is. Quantise the original instead"
            )
        self._check_sizes(name, numel)
        tables = {"quant_map": bnb.get_4bit_type("nf4", device="cpu"), "nested_quant_map": bnb.create_dynamic_map()}  # type: ignore[no-untyped-call]  # bitsandbytes is untyped
        for key, table in tables.items():
            if not torch.allclose(self._checkpoint.read(f"{name}.{key}").float(), table.float(), rtol=0, atol=1e-6):
                raise UserError(f"{where}.{key} is not bitsandbytes' own table. Quantise the original instead")
        count = numel // SUPERBLOCK
        return NF4Tensors(
            self._checkpoint.read(name).view(torch.uint8).view(count, SUPERBLOCK // 2),
            self._checkpoint.read(f"{name}.absmax").view(count, BLOCKS_PER_SUPERBLOCK),
            self._checkpoint.read(f"{name}.nested_absmax").float(),
            torch.full((count,), float(state["nested_offset"])),
        )

    def _check_sizes(self, name: str, numel: int) -> None:
        """Check the size of each tensor that a weight of so many elements is stored in. Raises: ValueError."""
        sizes = {
            name: numel // 2,
            f"{name}.absmax": numel // BLOCK,
            f"{name}.nested_absmax": numel // SUPERBLOCK * 4,
            f"{name}.quant_map": 16 * 4,
            f"{name}.nested_quant_map": 256 * 4,
        }
        for part, size in sizes.items():
            if (found := self._checkpoint.nbytes(part)) != size:
                raise UserError(
                    f"{self._checkpoint.path}: {part} has {found:,} bytes, expected {size:,} for {numel:,} elements. "
                    "Download it again"
                )

    def _state(self, name: str) -> dict[str, Any]:
        content = self._checkpoint.read(f"{name}.{_STATE}").flatten().view(torch.uint8).numpy().tobytes()
        return parse_object(content, f"{self._checkpoint.path}: {name}.{_STATE}", _STRUCTURE)
