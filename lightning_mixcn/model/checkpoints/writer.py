"""Writing a Hugging Face checkpoint folder: streaming, sharded, all or nothing."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import (
    check_output,
    clear_disk_errors,
    disk_full,
    finish,
    partial_path,
)
from lightning_mixcn.files.safetensors import DTYPE_CODES, write_safetensors

from .folder import INDEX_FILE, SINGLE_FILE

# Above glibc's largest threshold (32 MiB) a block is mapped on its own; pages that are not written take no memory.
_BLOCK_BYTES = 64 * 2**20


class ShardWriter:
    """Context manager that writes ``config.json``, safetensors shards with their index, and further files.

    Everything goes to a hidden folder beside ``out`` (``.NAME.partial-…``), which is flushed to the disk and renamed at
    the end; after an error or Ctrl-C it is removed and nothing is left under ``out``. (After ``kill -9`` the hidden
    folder stays; it can be deleted.) The same tensors in the same order give the same bytes.

    Args:
        out: The folder to make; it may exist if it is empty.
        config: Content of ``config.json``.
        max_shard_bytes: A shard is written before it would grow beyond this, in bytes; peak memory is one shard. A
            larger tensor gets a shard of its own.

    Attributes:
        folder: The hidden folder, for callers that save further files into it.
        held_bytes: Size of the shard that is being filled, in bytes.

    Raises:
        FileExistsError: ``out`` is a file or a folder that is not empty.
        OSError: the disk is full, or cannot be written.

    Example:
        >>> import os, tempfile, torch
        >>> out = tempfile.mkdtemp()
        >>> with ShardWriter(out, {"model_type": "mixtral"}) as writer:
        ...     writer.add("lm_head.weight", torch.zeros(2, 3))
        >>> sorted(os.listdir(out))
        ['config.json', 'model.safetensors']
    """

    def __init__(self, out: str | Path, config: Mapping[str, Any], *, max_shard_bytes: int = 1_000_000_000) -> None:
        """Check that ``out`` is free; nothing is written before the ``with`` block."""
        if max_shard_bytes < 1:
            raise UserError(f"`max_shard_bytes` must be at least 1, not {max_shard_bytes}")
        self.out = Path(out).expanduser().resolve()
        check_output(self.out)
        self.folder = partial_path(self.out)
        self._config = dict(config)
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._block = torch.empty(0, dtype=torch.uint8)
        self._block_used = 0
        self.held_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def __enter__(self) -> Self:
        """Make the hidden folder."""
        self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish and rename the folder, or remove it after an error."""
        try:
            if kind is None:
                with clear_disk_errors(self.out):
                    self._finish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; a copy is held until its shard is full.

        Args:
            name: Its name in the checkpoint.
            tensor: Any shape, on any device (moved to the CPU); its dtype is kept.

        Raises:
            ValueError: the name was added before, or safetensors has no such dtype.
            OSError: the disk is full.
        """
        if name in self._names:
            raise UserError(f"tensor {name!r} was added twice: each name may be added once")
        if tensor.dtype not in DTYPE_CODES:
            raise UserError(
                f"tensor {name!r} has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}"
            )
        if self._pending and self.held_bytes + tensor.nbytes > self._max_shard_bytes:
            with clear_disk_errors(self.out):
                self._flush()
        self._names.add(name)
        self._pending[name] = self._hold(tensor)
        self.held_bytes += tensor.nbytes

    def add_file(self, source: Path) -> None:
        """Copy a further file (a tokenizer's, for instance) into the folder, under its own name."""
        with clear_disk_errors(self.out):
            shutil.copyfile(source, self.folder / source.name)

    def require_free_bytes(self, expected_bytes: int) -> None:
        """Raise OSError now, rather than hours later, if the disk cannot hold ``expected_bytes`` bytes."""
        free = shutil.disk_usage(self.folder).free
        if free < expected_bytes:
            raise disk_full(self.out, f"{expected_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

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

    def _finish(self) -> None:
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
            self._write_json(INDEX_FILE, index)
        self._write_json("config.json", self._config)
        finish(self.folder, self.out)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (self.folder / name).write_text(text + "\n", encoding="utf-8")


def _unnumbered(number: int) -> str:
    """Name of a shard while the count of shards is not known."""
    return f"shard-{number:05d}.safetensors"
