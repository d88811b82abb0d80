"""Checkpoints as files: written under another name, summed, given their name in one step, checked before they are read.

A checkpoint is one file, or a folder of torch.distributed.checkpoint's under a strategy that shards. The sums are in
the format of ``sha256sum``: ``sha256sum -c`` checks them, too.
"""

import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.tensor import DTensor

from lightning_mixcn.errors import UserError, one_line
from lightning_mixcn.files.atomic import move_into_place, new_file, remove_path, write_text

from .checkpoint_schema import REMEDY, check_content

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
            raise UserError(f"{METADATA} puts {index.fqn} into {info.relative_path!r}, not a plain file beside it")
        if not file.is_file():
            raise UserError(f"{file.name} is missing")
        if file.stat().st_size < info.offset + info.length:
            size = f"{file.stat().st_size} bytes, expected at least {info.offset + info.length}"
            raise UserError(f"{file.name} is truncated: {size}")
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with file.open("rb") as shard:
                _check_object(shard, info.offset, info.length, f"{index.fqn} in {file.name}")


def _read_metadata(file: Path) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except FileNotFoundError as error:
        raise UserError(f"{file.name} is missing") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{file.name} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{file.name} holds {type(metadata).__name__}, expected torch's Metadata")
    return metadata


def _check_object(shard: BinaryIO, offset: int, length: int, name: str) -> None:
    shard.seek(offset)
    try:
        torch.load(io.BytesIO(shard.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{name} is more than plain data: {reason}") from error


SUMMED_KEY = "mixcn_summed"
"""Key in what a checkpoint holds: it was written to be published with sums, without which it is not complete."""

_SUMS = "SHA256SUMS"
_LARGEST_SUMS_BYTES = 16 * 2**20
_LIGHTNINGS = "meta.pt"
_NEEDED = (".metadata", _LIGHTNINGS)  # of a folder: torch's description, and what Lightning puts beside the tensors


def publish(unfinished: Path, path: Path) -> None:
    """Sum a checkpoint that is written completely, and give it its name; called on all ranks.

    At every moment there is either nothing under the name, or a complete checkpoint. One that was there is replaced: a
    file in one step, a folder in two.

    Args:
        unfinished: File or folder, seen by every rank that wrote to it.
        path: Name of the checkpoint, in the same folder.
    """
    sums = _gathered_sums(unfinished)
    if _rank() != 0:
        return
    if unfinished.is_dir():
        write_text(unfinished / _SUMS, _as_lines(sums))
    # A kill from here on leaves one without sums, which is complete nevertheless.
    sidecar(path).unlink(missing_ok=True)
    if path.is_dir() != unfinished.is_dir():
        remove_path(path, METADATA)
    move_into_place(unfinished, path, (METADATA, "*"))
    if path.is_file():
        write_text(sidecar(path), _as_lines({path.name: sums[unfinished.name]}))


def remove(path: Path) -> None:
    """Remove a checkpoint and its sums; a kill never leaves half a folder under its name. Args: path: Checkpoint."""
    sidecar(path).unlink(missing_ok=True)
    remove_path(path, METADATA)


def sidecar(path: Path) -> Path:
    """Return the file with the sum of a single-file checkpoint."""
    return path.with_name(f"{path.name}.sha256")


def verify(path: Path) -> None:
    """Check that a checkpoint is complete, unaltered, and safe to read.

    Args:
        path: File, folder, or a link to one. Without sums, as one from elsewhere, it is still checked for being whole.

    Raises:
        ValueError: says what is wrong with it, and names the newest complete one beside it.
    """
    path = path.resolve()
    fault = find_fault(path)
    if fault is None:
        return
    others = (other for other in _newest_first(path.parent) if other != path)
    complete = next((other for other in others if find_fault(other) is None), None)
    remedy = (
        "There is no complete one beside it: start again without --ckpt_path, or restore it from a copy"
        if complete is None
        else f"The one before it, {complete.name}, is complete: give --ckpt_path {complete}"
    )
    raise UserError(f"The checkpoint {path} cannot be used: {fault}. {remedy}")


def find_fault(path: Path) -> str | None:
    """Find the fault of a checkpoint.

    Args:
        path: File or folder.

    Returns:
        The fault in words, or nothing.
    """
    if not path.exists():
        return "it is not there"
    try:
        _check_sums(path)
        if path.is_dir():
            _check_needed(path)
            check_metadata(path)
        else:
            _check_archive(path, whole=not sidecar(path).exists())
    except (ValueError, OSError) as error:
        return str(error)
    except Exception as error:  # a damaged archive raises nearly anything, and the other ranks wait for the answer
        return f"it is damaged: {type(error).__name__}: {one_line(error)}"
    return None


def check_before_loading(trainer: Any, check: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Have a trainer's strategy verify each checkpoint before it reads it, and write directly; called on all ranks.

    Until then Lightning tells nobody which checkpoint it is: ``last`` and ``best`` stand for a path, too. No checkpoint
    is read with ``weights_only=False``, which would run what a stranger put into it.

    Args:
        trainer: Lightning's.
        check: Called with what a checkpoint holds beside its tensors before a strategy fills model and optimizer from
            it, as those that shard do while they read; it raises ValueError, on all ranks alike.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no plugin of the user's
        trainer.strategy.checkpoint_io = _DirectCheckpointIO()
    if not isinstance(trainer.strategy.load_checkpoint, _CheckedLoad):
        trainer.strategy.load_checkpoint = _CheckedLoad(trainer, check)


class _DirectCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints where they belong: Lightning's own way is by memory and a whole copy in ``$TMPDIR``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one file. Raises: OSError if the disk is full."""
        place = Path(path)
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        elif place.name.startswith("."):  # `publish` renames it
            place.parent.mkdir(parents=True, exist_ok=True)
            _save(checkpoint, place)
        else:
            with new_file(place, replace=True) as unfinished:
                _save(checkpoint, unfinished)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # of torch's archive, about what the system said before
        if not isinstance(error.__context__, OSError):
            raise
        raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error


class _CheckedLoad:
    """Stands before a strategy's `load_checkpoint`."""

    def __init__(self, trainer: Any, check: Callable[[dict[str, Any]], None] | None) -> None:
        self._trainer, self._strategy, self._check = trainer, trainer.strategy, check
        self._load = trainer.strategy.load_checkpoint

    def __call__(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load. Raises: ValueError, the same on all ranks, if the checkpoint cannot be used."""
        message = None
        if "://" not in str(checkpoint_path) and self._strategy.is_global_zero:
            try:
                verify(Path(checkpoint_path))
            except ValueError as error:
                message = str(error)
        if message := self._strategy.broadcast(message):
            raise UserError(message)
        if not isinstance(self._strategy, ModelParallelStrategy):
            checkpoint: dict[str, Any] = _read(checkpoint_path, lambda: self._load(checkpoint_path, weights_only=True))
            self._check_structure(checkpoint, checkpoint_path)
            return checkpoint
        content = read_settings(Path(checkpoint_path))
        self._check_structure(content, checkpoint_path)
        if self._check is not None:
            self._check(content)
        loaded: dict[str, Any] = self._load(checkpoint_path, weights_only=True)
        # Each rank has read its own shards, and all have to end together.
        if self._strategy.reduce_boolean_decision(not _is_finite(self._strategy), all=False):
            raise UserError(
                f"The checkpoint {checkpoint_path} cannot be used: it holds NaN or infinite values. {REMEDY}"
            )
        return loaded

    def _check_structure(self, content: Any, path: str | Path) -> None:
        try:
            sharded = "://" not in str(path) and Path(path).is_dir()
            fitting = self._trainer.state.fn == TrainerFn.FITTING
            check_content(content, fitting=fitting, sharded=sharded)
            if fitting:
                _check_position(getattr(self._trainer, "datamodule", None), content)
        except UserError as error:
            raise UserError(f"The checkpoint {path} cannot be used: {error}. {REMEDY}") from error


def _check_position(data: LightningDataModule | None, content: dict[str, Any]) -> None:
    """Check that a data module with a state has one: without, Lightning would begin with the first row, in silence."""
    if data is None or type(data).state_dict is LightningDataModule.state_dict or not content["global_step"]:
        return
    if (name := type(data).__qualname__) not in content:
        raise UserError(f"{name}, the position in the data, is missing")


def _is_finite(strategy: Any) -> bool:
    """Tell whether this rank's shards of what trains, and of its optimizers' states, are finite numbers."""
    trained = [parameter for parameter in strategy.lightning_module.parameters() if parameter.requires_grad]
    states = [state for optimizer in strategy.optimizers for state in optimizer.state.values()]
    values = [*trained, *(value for state in states for value in state.values() if isinstance(value, Tensor))]
    shards = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return all(bool(shard.isfinite().all()) for shard in shards)


def read_settings(path: Path) -> Any:
    """Read what a checkpoint holds beside its tensors, without checking it.

    Args:
        path: File, of which tensors are mapped and not read, or folder.

    Raises:
        ValueError: torch cannot read it, or it is more than plain data.
    """
    if path.is_dir():
        return _read(path, lambda: torch.load(path / _LIGHTNINGS, map_location="cpu", weights_only=True))
    return _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _read(path: str | Path, load: Callable[[], Any]) -> Any:
    """Read a checkpoint with torch, in whose messages the reason is one line of many."""
    try:
        return load()
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        lines = [line for line in str(error).splitlines() if line.strip()]
        # What follows in the first line is advice to run what the file holds.
        is_more = len(lines) > 1 and lines[0].startswith("Weights only load failed")
        reason = f"it is more than plain data: {lines[1]}" if is_more else f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"The checkpoint {path} cannot be used: {reason}. {REMEDY}") from error


def _check_sums(path: Path) -> None:
    """Compare with the sums, if there are any. Raises: ValueError."""
    file = path / _SUMS if path.is_dir() else sidecar(path)
    if not file.exists():
        if path.is_dir() and (path / _LIGHTNINGS).is_file() and _promises_sums(path):
            raise UserError(f"{_SUMS} is missing")
        return
    if file.stat().st_size > _LARGEST_SUMS_BYTES:
        raise UserError(f"{file.name} is no list of SHA-256 sums, as sha256sum writes it")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64}) [ *](\S.*)", line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) != len(lines) or not lines:
        raise UserError(f"{file.name} is no list of SHA-256 sums, as sha256sum writes it")
    folder = path if path.is_dir() else path.parent
    # Hidden files are the system's own, such as .nfs… and .DS_Store.
    expected = {*_NEEDED, *(file.name for file in path.glob("[!.]*"))} - {_SUMS} if path.is_dir() else {path.name}
    if unlisted := sorted(expected - sums.keys()):
        raise UserError(f"{file.name} does not list {', '.join(unlisted)}")
    if path.is_file():
        elsewhere = sorted(sums.keys() - expected)
    else:
        elsewhere = sorted(name for name in sums if Path(name).name != name or name == "..")
    if elsewhere:
        raise UserError(f"{file.name} names {elsewhere[0]!r}, which is no part of the checkpoint")
    for name, expected_sum in sums.items():
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing")
        if (found := _sum(folder / name)) != expected_sum:
            raise UserError(f"{name} is truncated or altered: its SHA-256 is {found[:12]}…, not {expected_sum[:12]}…")


def _promises_sums(folder: Path) -> bool:
    """Tell whether a folder was written to be summed; it has its name only once that is done."""
    content = read_settings(folder)
    return isinstance(content, dict) and bool(content.get(SUMMED_KEY))


def _check_needed(folder: Path) -> None:
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing")


def _check_archive(path: Path, *, whole: bool) -> None:
    """Check that a file is torch's archive, and perhaps its own checksums. Raises: ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            # A few bytes that are packed can be any number once they are read.
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            damaged = archive.testzip() if whole and not packed else None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path.name} is truncated, or was not written by torch: {error}") from error
    if packed:
        raise UserError(f"{path.name} was not written by torch: it is compressed")
    if damaged:
        raise UserError(f"{path.name} is altered: the sum of {damaged} inside it is another")


def _newest_first(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("[!.]*.ckpt") if not path.is_symlink()]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _gathered_sums(path: Path) -> dict[str, str]:
    """Return each file's SHA-256 by its name. Each rank sums what it wrote and flushes it to the disk."""
    sums = {file.name: _sum(file, sync=True) for file in _own_files(path)}
    if _ranks() == 1:
        return sums
    gathered: list[dict[str, str]] = [{}] * _ranks()
    distributed.all_gather_object(gathered, sums)
    return {name: value for part in gathered for name, value in part.items()}


def _own_files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for file in path.iterdir():
            shard = re.match(r"__(\d+)_", file.name)  # __<rank>_<number>.distcp
            if (int(shard[1]) % _ranks() if shard else 0) == _rank():
                yield file
    elif _rank() == 0:
        yield path


def _sum(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return digest


def _as_lines(sums: dict[str, str]) -> str:
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
