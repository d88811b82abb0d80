"""A Hugging Face checkpoint folder, of which nothing but headers is read until it is asked for."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.safetensors import SafetensorsFile, TensorHeader
from lightning_mixcn.files.schema import TEXT, mapping_of, record

from .configuration import check_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version")
_COMPARED_ELEMENTS = 2**24
_SAMPLE_BYTES = 4096
_SAMPLE_EVERY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorSlice:
    """Part of a stored tensor: ``tensor[index][rows[0]:rows[1]]``, each of the two left out where ``None``.

    It is contiguous on disk whatever the shape. ``rows`` counts the first dimension left after ``index``.
    """

    name: str
    index: int | None = None
    rows: tuple[int, int] | None = None


def recorded_path(path: str | Path) -> str:
    """Return how a base is named in files: a folder by its absolute path, a hub id (or what is not there) as given."""
    folder = Path(path).expanduser()
    return os.path.abspath(folder) if folder.is_dir() else str(path)


class Checkpoint:
    """A folder of ``config.json`` and safetensors weights (one file, or shards and their index).

    Opening it reads headers only. Tensors are read into private copies without mapping files, so that resident memory
    never holds more than what was asked for.

    Args:
        path: The folder, or a hub id ``owner/name``.

    Attributes:
        path: The folder.
        name: The model's name in files: a folder's absolute path, or the hub id. See `recorded_path`.
        config: Content of ``config.json``.

    Raises:
        FileNotFoundError: the folder, its config, its weights or a shard named by the index are missing. Pickles
            (``.bin``) do not count as weights: they can run code.
        ValueError: a file is truncated or unreadable, or the index names a tensor that its file does not hold.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the config and the headers."""
        self.path, self.name = local_folder(path), recorded_path(path)
        self.config = read_config(self.path)
        self._file_of = _locate_tensors(self.path)

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor of this name."""
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. ValueError if there is none."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the file. ValueError if there is none."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes. ValueError if there is none."""
        entry = self._entry(name)
        return entry.numel * entry.dtype.itemsize

    def read(self, name: str) -> Tensor:
        """Read tensor ``name`` whole: a private copy with the file's shape and dtype, of any dtype."""
        shape = self.shape(name)
        return self._file_of[name].read(name).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read ``tensor[start:stop]`` of any dtype, touching nothing else of the file.

        Args:
            name: Tensor of at least one dimension.
            start: First row.
            stop: Row after the last.

        Returns:
            ``[stop - start, ...]``, a private copy.

        Raises:
            ValueError: no such tensor, or rows outside it.
        """
        shape = self.shape(name)
        first, last = self._span(TensorSlice(name, rows=(start, stop)))
        return self._file_of[name].read(name, first, last).reshape(stop - start, *shape[1:])

    def read_segments(
        self, segments: Sequence[TensorSlice], start: int, stop: int, target: Tensor | None = None
    ) -> Tensor:
        """Read a range of elements of several weights laid end to end.

        With experts as segments in order this gives each rank its own superblocks of a fused weight, in either naming,
        without reading anyone else's.

        Args:
            segments: Parts that are laid end to end, each flattened (row-major), all of one dtype.
            start: First element of the concatenation.
            stop: Element after the last.
            target: Contiguous memory ``[stop - start]`` on the CPU in the file's dtype; ``None`` makes it.

        Returns:
            ``target``, or a private copy of that kind.

        Raises:
            ValueError: a segment is not in the checkpoint or has another dtype than the first, the range lies outside
                the concatenation, or the numbers are not float64, float32, float16 or bfloat16 although the config
                declares no quantisation (which would explain them).
        """
        dtype = self._common_dtype(segments)
        spans = [self._span(segment) for segment in segments]
        total = sum(last - first for first, last in spans)
        if not 0 <= start <= stop <= total:
            raise UserError(
                f"elements [{start}, {stop}) were asked of segments that hold {total}: ask within [0, {total}]"
            )
        target = torch.empty(stop - start, dtype=dtype) if target is None else target
        base = 0
        for segment, (first, last) in zip(segments, spans, strict=True):
            low, high = max(start, base), min(stop, base + last - first)
            if low < high:
                file = self._file_of[segment.name]
                file.read_into(target[low - start : high - start], segment.name, first + low - base)
            base += last - first
        return target

    def ties_head(self) -> bool:
        """Tell whether the head is the embedding: the config says so, and the files hold no other (transformers 5)."""
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if not self.config.get("tie_word_embeddings") or not all(name in self for name in names):
            return bool(self.config.get("tie_word_embeddings"))
        shape = self.shape(names[0])
        if shape != self.shape(names[1]):
            return False
        rows = max(1, _COMPARED_ELEMENTS // math.prod(shape[1:]))
        for start in range(0, shape[0], rows):
            head, embedding = (self.read_rows(name, start, min(start + rows, shape[0])).float() for name in names)
            if not torch.equal(head, embedding):
                return False
        return True

    @cached_property
    def sha256(self) -> str:
        """Hash the config and every tensor's name, shape, dtype and sampled content.

        Samples are 4 KiB at both ends of each tensor and about every 64 MiB between, so that a 90 GB checkpoint takes
        seconds and a tensor that was trained on is noticed. Shard boundaries, file names and the version of
        transformers that saved the folder do not matter.

        Returns:
            SHA-256, 64 hexadecimal digits.
        """
        config = {key: value for key, value in self.config.items() if key not in _VOLATILE_CONFIG_KEYS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in self.names():
            entry = self._entry(name)
            digest.update(f"\n{name} {entry.dtype} {entry.shape}\n".encode())
            for first, last in _sample_ranges(entry):
                digest.update(self._file_of[name].read(name, first, last).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _entry(self, name: str) -> TensorHeader:
        if name not in self._file_of:
            raise UserError(
                f"tensor {name!r} is missing in {str(self.path)!r}, which holds {len(self._file_of)} others. "
                "Check that config.json belongs to these weights and that the checkpoint is complete"
            )
        return self._file_of[name].entries[name]

    def _span(self, segment: TensorSlice) -> tuple[int, int]:
        """Return the first element of a segment and the one after the last, counted in its flattened tensor."""
        shape = self.shape(segment.name)
        first = 0
        if segment.index is not None:
            if not shape or not 0 <= segment.index < shape[0]:
                raise UserError(f"{segment} asks for an index outside of the stored shape {list(shape)}")
            shape = shape[1:]
            first = segment.index * math.prod(shape)
        low, high = segment.rows if segment.rows is not None else (0, shape[0] if shape else 1)
        if not 0 <= low <= high <= (shape[0] if shape else 1):
            raise UserError(f"{segment} asks for rows outside of the stored shape {list(self.shape(segment.name))}")
        row = math.prod(shape[1:])
        return first + low * row, first + high * row

    def _common_dtype(self, segments: Sequence[TensorSlice]) -> torch.dtype:
        if not segments:
            raise UserError("`segments` is empty, expected at least one segment")
        expected = self.dtype(segments[0].name)
        for segment in segments:
            dtype = self.dtype(segment.name)
            if dtype not in _WEIGHT_DTYPES and not self.config.get("quantization_config"):
                raise UserError(
                    f"tensor {segment.name!r} in {str(self.path)!r} has dtype {dtype}, expected float weights "
                    "(float32, float16 or bfloat16). Give an unquantised checkpoint"
                )
            if dtype != expected:
                raise UserError(
                    f"tensor {segment.name!r} in {str(self.path)!r} has dtype {dtype}, but {segments[0].name!r} "
                    f"has {expected}. Save the checkpoint in one dtype"
                )
        return expected


def _sample_ranges(entry: TensorHeader) -> list[tuple[int, int]]:
    length = min(entry.numel, _SAMPLE_BYTES // entry.dtype.itemsize)
    gaps = 1 + entry.numel * entry.dtype.itemsize // _SAMPLE_EVERY_BYTES
    starts = sorted({(entry.numel - length) * i // gaps for i in range(gaps + 1)})
    return [(start, start + length) for start in starts]


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a model's folder. Raises: FileNotFoundError, ValueError."""
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(
            f"{str(folder)!r} has no {CONFIG_FILE}: a Hugging Face model folder has one. Give the folder that holds "
            "the model"
        )
    return read_object(folder / CONFIG_FILE, check_config)


def _locate_tensors(folder: Path) -> dict[str, SafetensorsFile]:
    """Map each tensor's name to its file; the single file goes before the index, as in transformers."""
    if (folder / SINGLE_FILE).is_file():
        file = SafetensorsFile(folder / SINGLE_FILE)
        located = dict.fromkeys(file.entries, file)
    elif (folder / INDEX_FILE).is_file():
        located = _locate_by_index(folder)
    else:
        raise MissingFileError(_no_weights(folder))
    if not located:
        raise UserError(f"{str(folder)!r}: its safetensors hold no tensor. Copy or download the checkpoint again")
    return located


def _locate_by_index(folder: Path) -> dict[str, SafetensorsFile]:
    index = folder / INDEX_FILE
    weight_map: dict[str, str] = read_object(index, record({"weight_map": mapping_of(TEXT, TEXT)}))["weight_map"]
    files: dict[str, SafetensorsFile] = {}
    for name, file_name in weight_map.items():
        # An index from a stranger must not reach outside its folder.
        if Path(file_name).name != file_name or "\0" in file_name:
            raise UserError(f"{str(index)!r} names {file_name!r} for {name!r}, expected a file beside it")
        if file_name not in files:
            if not (folder / file_name).is_file():
                raise MissingFileError(
                    f"{str(index)!r} names {file_name!r}, which is not there. Copy or download the missing shard"
                )
            files[file_name] = SafetensorsFile(folder / file_name)
        if name not in files[file_name].entries:
            raise UserError(
                f"{str(index)!r} says that {file_name!r} holds tensor {name!r}, but it does not. "
                "Copy or download the checkpoint again"
            )
    return {name: files[file_name] for name, file_name in weight_map.items()}


def _no_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    expected = f"{str(folder)!r} holds no weights: expected {SINGLE_FILE}, or shards with {INDEX_FILE}"
    if "adapter_model.safetensors" in found:
        return f"{expected}; it is a PEFT adapter. Give the folder of its base model"
    if any(name.endswith(".safetensors") for name in found):
        return f"{expected}; it has safetensors under other names. Copy the index too, or rename a single file"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        return (
            f"{expected}; it has pickles only (.bin), which are refused since they can run code. "
            "Save the model with safetensors (transformers: save_pretrained)"
        )
    return f"{expected}. Copy or download the checkpoint again"
