"""Read and write one safetensors file without mapping it into memory.

A mapped file's pages count in a process's resident memory for as long as the map lives, so reading a 5.8 GB file slice
by slice through a map ends with 5.8 GB resident. The library's ``backend="pread"`` maps nothing, but reads the whole
tensor for every slice of it: 9 times the time of this reader for the chunks of a matrix of 0.3 GB (safetensors 0.8.0).
Here bytes go with ``read`` straight into the tensor that is returned: the peak is that tensor. The format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import flush_to_disk

from .json_object import LARGEST_JSON_BYTES, parse_object

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of the format that torch can hold and this project reads and writes."""

DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


_SUM = "xxh3_128"  # key of the header's metadata, which other readers pass over


@dataclass(frozen=True)
class TensorHeader:
    """Type, shape and place of one tensor; ``offset`` is its first byte, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class SafetensorsFile:
    """The header of one safetensors file, and reads of element ranges from it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or its header cannot be read or holds a dtype that is not supported.

    Attributes:
        metadata: The header's further texts, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header."""
        self.path = path
        self.entries, self.metadata = _read_header(path)
        self._sum = self.metadata.get(_SUM)

    def check_sum(self) -> None:
        """Compare all tensors with the sum in the header, if `write_safetensors` wrote one; reads the whole file.

        Raises:
            ValueError: they differ.
        """
        if self._sum is not None and self._sum != _sum_of((name, self.read(name)) for name in sorted(self.entries)):
            raise UserError(
                f"{str(self.path)!r} was changed or damaged after it was written: its tensors have another sum than "
                "its header says. Copy or download the file again"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements ``[start, stop)`` of the flattened tensor ``name``; returns a private 1-D tensor."""
        entry = self.entries[name]
        stop = entry.numel if stop is None else stop
        target = torch.empty(stop - start, dtype=entry.dtype)
        self.read_into(target, name, start)
        return target

    def read_into(self, target: Tensor, name: str, start: int) -> None:
        """Fill ``target`` (1-D, contiguous, the tensor's dtype) from element ``start`` of the flattened tensor."""
        entry = self.entries[name]
        assert target.dtype == entry.dtype
        assert 0 <= start <= start + target.numel() <= entry.numel
        if target.numel() == 0:
            return
        buffer = target.view(torch.uint8).numpy().data
        filled = 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + start * entry.dtype.itemsize)
            while filled < len(buffer):  # one read gives at most 2 GiB on Linux
                count = file.readinto(buffer[filled:])
                if not count:
                    raise UserError(
                        f"{str(self.path)!r} ended while tensor {name!r} was read: it became shorter than its header "
                        "says. Copy or download the file again"
                    )
                filled += count


def _sum_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return XXH3's 128 bits of names and bytes, in the order given: against accidents, not attackers."""
    found = xxhash.xxh3_128()
    for name, tensor in tensors:
        found.update(f"{name}\n{tensor.nbytes}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    if not path.is_file():
        raise MissingFileError(f"{str(path)!r} is not there. Copy or download the checkpoint again")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if 8 + length <= size and length <= LARGEST_JSON_BYTES else b""
        header = parse_object(raw, repr(str(path)))
        metadata = dict(header.pop("__metadata__", None) or {})
        spans = {name: tuple(value["data_offsets"]) for name, value in header.items()}
        end = 8 + length + max((stop for _, stop in spans.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{str(path)!r} ({size:,} bytes) has no readable safetensors header: it is truncated or another format. "
            "Copy or download the file again"
        ) from None
    if size < end:
        raise UserError(
            f"{str(path)!r} is truncated: its header promises {end:,} bytes, the file has {size:,}. "
            "Copy or download the file again"
        )
    _check_by_library(path)
    entries = {}
    for name, value in header.items():
        if value["dtype"] not in DTYPES:
            raise UserError(
                f"{str(path)!r}: tensor {name!r} has dtype {value['dtype']}, expected one of {', '.join(DTYPES)}. "
                "Save the checkpoint in one of these"
            )
        entries[name] = TensorHeader(DTYPES[value["dtype"]], tuple(value["shape"]), 8 + length + spans[name][0])
    return entries, metadata


def _check_by_library(path: Path) -> None:
    """Let the library judge what it knows best: overlapping or missing ranges, shapes that do not fit them."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(
            f"{str(path)!r} has a broken safetensors header ({error}). Copy or download the file again"
        ) from error


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, with_sum: bool = False, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file, byte for byte what ``safetensors.torch.save_file`` writes.

    Unlike that function it accepts tensors that share memory (identical experts), each written in full. The data is
    flushed to the disk before returning.

    Args:
        path: File to make.
        tensors: Name to tensor, on any device.
        with_sum: Have the header hold a sum of the tensors for `SafetensorsFile.check_sum`, for a file that no list of
            sums goes with.
        metadata: Further texts for the header.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    # The library reads memory from a tensor's address on, whatever its strides and device.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    texts = {"format": "pt", **(metadata or {})} | ({_SUM: _sum_of(sorted(tensors.items()))} if with_sum else {})
    path.touch(exist_ok=False)
    mode = path.stat().st_mode  # as the umask says; the library's files are their owner's alone
    try:
        serialize_file(specs, path, metadata=texts)
    except SafetensorError as error:  # which has the system's error in its text alone
        if (found := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    path.chmod(mode)
    if with_sum:
        _sort_metadata(path)
    flush_to_disk(path)


def _sort_metadata(path: Path) -> None:
    """Give the header's metadata one order: the library's changes from call to call, and with it the file's bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # The library's own way of writing, which pads with spaces, so the length stays.
        sorted_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(sorted_header) == length
        file.seek(8)
        file.write(sorted_header)
