"""`mixcn quantize`: a Hugging Face Mixtral to a 4-bit folder that loads without quantising again."""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .layout import Entry, entries
from .loading import QUANTIZATION_METHOD, check_entry, is_quantised, mixtral_config, pieces, torch_dtype
from .mixtral import meta_model
from .nf4 import BLOCK, SUPERBLOCK
from .shard_writer import ShardWriter
from .weights import NF4Weight

_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
           "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip


def quantize(src: str, out: str, *, dtype: str = "bfloat16") -> None:
    """Write SRC in 4 bits (NF4, double quantised) to the folder OUT: about 0.52 bytes a weight, experts included.

    Weight by weight: the host holds one shard of at most 2 GB and one weight, whatever the model's size.

    Args:
        src: Mixtral folder (safetensors) or hub id.
        out: Folder to make; it must not exist, or be empty.
        dtype: Type of embeddings, head, norms and router, which stay unquantised: bfloat16, float16 or float32.
    """
    checkpoint = Checkpoint(src)
    config = mixtral_config(checkpoint)
    if is_quantised(checkpoint):
        raise ValueError(f"`src={src!r}` is in 4 bits already. Use it as it is")
    model = meta_model(config, "nf4", torch_dtype(dtype))
    todo = list(entries(model, checkpoint, config))
    for entry in todo:
        check_entry(entry, checkpoint)
    method = {"quant_method": QUANTIZATION_METHOD, "block_size": BLOCK, "superblock_size": SUPERBLOCK}
    settings = checkpoint.config | {"quantization_config": method, "dtype": dtype}
    with ShardWriter(out, settings) as writer:
        for entry in tqdm(todo, desc="quantising", unit=" weights"):
            for name, tensor in _tensors(entry, checkpoint, torch_dtype(dtype)).items():
                writer.add(name, tensor)
        for name in _COPIED:
            if (checkpoint.path / name).is_file():
                writer.add_file(checkpoint.path / name)


def _tensors(entry: Entry, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """One weight as it is stored: four tensors where it is quantised, else one."""
    if entry.attribute is None and isinstance(entry.storage, NF4Weight):
        storage = NF4Weight(entry.storage.shape)
        for start, values in pieces(entry, checkpoint):
            storage.write(start, values)
        return {f"{entry.name}.storage.{name}": tensor.detach() for name, tensor in storage.named_parameters()}
    values = torch.cat([values for _, values in pieces(entry, checkpoint)]).view(entry.shape).to(dtype)
    return {f"{entry.name}.{entry.attribute or 'storage.values'}": values}
