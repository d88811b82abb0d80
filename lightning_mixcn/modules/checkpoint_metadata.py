"""The pickled parts of a sharded checkpoint, read without running anything that is in them.

torch.distributed.checkpoint reads ``.metadata`` with `pickle.load`, and what is no tensor, such as a learning rate,
with ``torch.load(weights_only=False)``: either runs what a stranger put there.
"""

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

METADATA = ".metadata"

_CHECKPOINT = "torch.distributed.checkpoint"
# All that torch 2.11 to 2.13 write, besides the dtypes.
_ALLOWED = frozenset(
    {
        *(
            (f"{_CHECKPOINT}.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13's name of it
    }
)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what the description of a checkpoint consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up an allowed global. Raises: UnpicklingError if it is another."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def check_metadata(folder: Path) -> None:
    """Check that a sharded checkpoint can be loaded safely, and that no file is shorter than it should be.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: its description or an object in it cannot be read, or asks for code; a file is missing or truncated.
    """
    metadata = _read_metadata(folder / METADATA)
    for index, info in (metadata.storage_data or {}).items():
        file = folder / info.relative_path
        if file.parent != folder or info.transform_descriptors:
            raise ValueError(f"{METADATA} puts {index.fqn} into {info.relative_path!r}, not a plain file beside it")
        if not file.is_file():
            raise ValueError(f"{file.name} is missing")
        if file.stat().st_size < info.offset + info.length:
            size = f"{file.stat().st_size} bytes, expected at least {info.offset + info.length}"
            raise ValueError(f"{file.name} is truncated: {size}")
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with file.open("rb") as shard:
                _check_object(shard, info.offset, info.length, f"{index.fqn} in {file.name}")


def _read_metadata(file: Path) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except FileNotFoundError as error:
        raise ValueError(f"{file.name} is missing") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{file.name} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{file.name} holds {type(metadata).__name__}, expected torch's Metadata")
    return metadata


def _check_object(shard: BinaryIO, offset: int, length: int, name: str) -> None:
    shard.seek(offset)
    try:
        torch.load(io.BytesIO(shard.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{name} is more than plain data: {reason}") from error
