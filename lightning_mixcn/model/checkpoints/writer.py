"""Write a Hugging Face checkpoint folder: streamed, sharded, all or nothing."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_folder, write_json
from lightning_mixcn.files.safetensors import DTYPE_CODES, write_safetensors

from .folder import INDEX_FILE, SINGLE_FILE

# Above glibc's largest threshold (32 MiB) a block is mapped on its own; pages that are not written take no memory.
_BLOCK_BYTES = 64 * 2**20


@contextmanager
def new_checkpoint(
    out: str | Path, config: Mapping[str, Any], *, max_shard_bytes: int = 1_000_000_000
) -> Iterator["ShardWriter"]:
    """Write ``config.json``, safetensors shards with their index, and further files, all of them or nothing.

    The same tensors in the same order give the same bytes.

    Args:
        out: Folder to make, see `new_folder`.
        config: Content of ``config.json``.
        max_shard_bytes: Size in bytes beyond which a shard does not grow; peak memory is one shard. A larger tensor
            gets a shard of its own.

    Yields:
        The writer of the shards.

    Raises:
        FileExistsError: ``out`` is a file or a folder that is not empty.
        OSError: the disk is full, or cannot be written.

    Example:
        >>> import os, tempfile, torch
        >>> out = tempfile.mkdtemp()
        >>> with new_checkpoint(out, {"vocab_size": 2}) as writer:
        ...     writer.add("lm_head.weight", torch.zeros(2, 3))
        >>> sorted(os.listdir(out))
        ['config.json', 'model.safetensors']
    """
    if max_shard_bytes < 1:
        raise UserError(f"`max_shard_bytes` must be at least 1, not {max_shard_bytes}")
    with new_folder(Path(out).expanduser().resolve()) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        yield writer
        writer.finish()
        write_json(folder / "config.json", dict(config), sort_keys=True)


class ShardWriter:
    """Tensors on their way into the shards of a folder. See `new_checkpoint`.

    Attributes:
        folder: The hidden folder, for callers that save further files into it.
        held_bytes: Size of the shard that is being filled, in bytes.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        """Begin the first shard."""
        self.folder, self._max_shard_bytes = folder, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._block = torch.empty(0, dtype=torch.uint8)
        self._block_used = 0
        self.held_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; a copy is held until its shard is full.

        Args:
            name: Name in the checkpoint.
            tensor: Any shape, on any device (moved to the CPU); its dtype is kept.

        Raises:
            ValueError: the name was added before, or safetensors has no such dtype.
        """
        if name in self._names:
            raise UserError(f"tensor {name!r} was added twice: each name may be added once")
        if tensor.dtype not in DTYPE_CODES:
            raise UserError(
                f"tensor {name!r} has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}"
            )
        if self._pending and self.held_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._pending[name] = self._hold(tensor)
        self.held_bytes += tensor.nbytes

    def add_file(self, source: Path) -> None:
        """Copy a further file (a tokenizer's, for instance) into the folder, under its own name."""
        shutil.copyfile(source, self.folder / source.name)

    def require_free_bytes(self, expected_bytes: int) -> None:
        """Raise OSError now, rather than hours later, if the disk cannot hold ``expected_bytes`` bytes."""
        free = shutil.disk_usage(self.folder).free
        if free < expected_bytes:
            needed = f"{expected_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
            raise OSError(errno.ENOSPC, needed)  # `new_folder` names the output

    def _hold(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into large blocks, which the C library gives back to the system when they are freed.

        Held one by one, tensors of some megabytes fragment its heap, and resident memory grows to two shards.
        """
        start = -(-self._block_used // 64) * 64  # aligned for every dtype
        if start + tensor.nbytes > len(self._block):
            self._block, start = torch.empty(max(_BLOCK_BYTES, tensor.nbytes), dtype=torch.uint8), 0
        self._block_used = start + tensor.nbytes
        held = self._block[start : self._block_used].view(tensor.dtype).view(tensor.shape)
        return held.copy_(tensor.detach())

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        write_safetensors(self.folder / _unnumbered(len(self._shards)), self._pending)
        self._total_bytes += self.held_bytes
        self._pending, self.held_bytes = {}, 0
        self._block, self._block_used = torch.empty(0, dtype=torch.uint8), 0

    def finish(self) -> None:
        """Write the last shard, and give all their final names."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / _unnumbered(number)).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX_FILE, index, sort_keys=True)


def _unnumbered(number: int) -> str:
    """Return the name of a shard while the count of shards is not known."""
    return f"shard-{number:05d}.safetensors"
