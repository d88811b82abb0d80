"""`mixcn quantize`: a Hugging Face mixture to a 4-bit folder that loads without quantising again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.written import say_written

if TYPE_CHECKING:  # their imports take seconds, for which `mixcn quantize --help` does not wait
    import torch
    from torch import Tensor

    from lightning_mixcn.model.checkpoints.bitsandbytes import BitsAndBytesSource
    from lightning_mixcn.model.checkpoints.folder import Checkpoint
    from lightning_mixcn.model.checkpoints.layout import StoredWeight


def quantize(src: str, out: str, *, dtype: str = "bfloat16") -> None:
    """Write SRC in 4 bits (NF4, double quantised) to the folder OUT: about 0.52 bytes a weight, experts included.

    Weight by weight: the host holds one shard of at most 2 GB and one weight, whatever the model's size. What
    bitsandbytes has quantised (NF4, double quantised, transformers 4) is taken over bit for bit. OUT is for this
    package alone: transformers refuses it. Adapters that are trained on it name SRC, which it records, as their base.

    Args:
        src: Folder (safetensors) or hub id of a mixture.
        out: Folder to make; it must not exist, or be empty.
        dtype: Type of embeddings, head, norms and router, which stay unquantised: bfloat16, float16 or float32.
    """
    from tqdm.auto import tqdm

    from lightning_mixcn.model.checkpoints.bitsandbytes import is_bitsandbytes
    from lightning_mixcn.model.checkpoints.folder import Checkpoint
    from lightning_mixcn.model.checkpoints.identity import (
        QUANTISED_PREFIX,
        QUANTIZATION_METHOD,
        write_identity,
    )
    from lightning_mixcn.model.checkpoints.reading import is_quantised, model_config, torch_dtype
    from lightning_mixcn.model.checkpoints.writer import new_checkpoint
    from lightning_mixcn.model.loading import open_entries
    from lightning_mixcn.model.nf4.codec import BLOCK, SUPERBLOCK
    from lightning_mixcn.tokenizer.files import GENERATION_FILE, tokenizer_files

    checkpoint = Checkpoint(src)
    config = model_config(checkpoint)
    if is_quantised(checkpoint) and not is_bitsandbytes(checkpoint):
        raise UserError(f"`src={src!r}` is in 4 bits already. Use it as it is")
    stored_dtype = torch_dtype(dtype)
    todo, source = open_entries(checkpoint, config)
    method = {"format": QUANTIZATION_METHOD, "block_size": BLOCK, "superblock_size": SUPERBLOCK}
    tied = {"tie_word_embeddings": config.tie_word_embeddings}
    changes = {"model_type": f"{QUANTISED_PREFIX}{config.model_type}", "quantization_config": method, "dtype": dtype}
    settings = checkpoint.config | tied | changes
    with new_checkpoint(out, settings) as writer:
        for entry in tqdm(todo, desc="quantising", unit=" weights"):
            for name, tensor in _tensors(entry, checkpoint, source, stored_dtype).items():
                writer.add(name, tensor)
        for file in [*tokenizer_files(checkpoint.path), checkpoint.path / GENERATION_FILE]:
            if file.is_file():
                writer.add_file(file)
        write_identity(writer.folder, {"path": checkpoint.name, "sha256": checkpoint.sha256})
    say_written(Path(out), "the model in 4 bits, for `model.init_args.base` of mixcn fit, and for mixcn chat")


def _tensors(
    entry: StoredWeight, checkpoint: Checkpoint, source: BitsAndBytesSource | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return one weight as it is stored: four tensors where it is quantised, else one."""
    import torch

    from lightning_mixcn.model.checkpoints.reading import pieces
    from lightning_mixcn.model.nf4.codec import dequantize_nf4
    from lightning_mixcn.model.nf4.storage import NF4Weight

    stored_name = f"{entry.name}.{entry.attribute or 'storage.values'}"
    if source is not None and source.holds(entry):
        packed = source.stack(entry)
        if entry.is_rounded:
            return {f"{entry.name}.storage.{name}": tensor for name, tensor in packed._asdict().items()}
        return {stored_name: dequantize_nf4(packed, dtype).view(entry.shape)}
    if entry.is_rounded:
        groups, rows, columns = entry.shape
        storage = NF4Weight((groups, rows, columns))
        for start, values in pieces(entry, checkpoint):
            storage.write(start, values)
        return {f"{entry.name}.storage.{name}": tensor.detach() for name, tensor in storage.named_parameters()}
    return {stored_name: torch.cat([values for _, values in pieces(entry, checkpoint)]).view(entry.shape).to(dtype)}
